"""Windows of frames of a `FrameStore`, each within one episode, gathered a batch at a time."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import Dataset

from latentact.data.order import Order
from latentact.data.store import FrameStore, known_rows
from latentact.errors import UserError
from latentact.types import Clip


class Clips(Dataset[Clip]):
    """Windows of frames at row - context*gap, ..., row, ..., row + horizon*gap, within one episode.

    Use with `DataLoader(clips, batch_size=..., collate_fn=lambda clip: clip)`: a batch is one gather.

    Args:
        store: the data.
        episodes: indices of the episodes with windows.
        frame_gap: rows between two frames of a window.
        context: frames before the current one; before the episode's start its first frame is repeated and
            marked as not valid.
        horizon: frames after the current one; all are within the episode, a gap apart in time.
        labeled: episodes with robot actions; the actions of all others are hidden.
        features: features of each row of the store ``[n, f]``.
        held_out: whether the episodes are held out, for messages.

    Raises:
        UserError: no episode is long enough for a window, or no two frames are one gap apart.
    """

    def __init__(
        self,
        store: FrameStore,
        *,
        episodes: Collection[int] | np.ndarray,
        frame_gap: int,
        context: int = 0,
        horizon: int = 1,
        labeled: Collection[int] | np.ndarray = (),
        features: np.ndarray | None = None,
        held_out: bool = False,
    ) -> None:
        """Find the windows."""
        self.store, self.frame_gap, self.context, self.horizon = store, frame_gap, context, horizon
        self._features = features
        ahead = horizon * frame_gap
        chosen = np.unique(np.asarray(list(episodes), np.int64))
        # complete[row]: row, row + gap, ... all start a valid transition
        transition = store.transitions(frame_gap)
        complete = np.isin(store.episode, chosen)
        for step in range(min(horizon, len(complete) // frame_gap + 2)):
            shift = min(step * frame_gap, len(complete))
            complete[len(complete) - shift :] = False
            complete[: len(complete) - shift] &= transition[shift:]
        self.rows: Int64[np.ndarray, " m"] = np.flatnonzero(complete)
        """Rows whose next `horizon` frames, a gap apart, are within the episode."""
        if not len(self.rows):
            kind, longest = "held-out " if held_out else "", int(store.lengths[chosen].max(initial=0))
            remedy = "a smaller gap or longer videos"
            remedy = f"another split_seed, a larger held_out, {remedy}" if held_out else remedy
            if longest <= ahead:
                raise UserError(
                    f"{kind}episodes of {store.path} must have at least {ahead + 1} frames for a window "
                    f"(frame gap {frame_gap}), got {longest} in the longest of {len(chosen)}. Use {remedy}."
                )
            raise UserError(
                f"{kind}episodes of {store.path} must have frames {frame_gap / store.fps:g} s apart (frame "
                f"gap {frame_gap}), got none in {len(chosen)} episodes. Check their times with latentact "
                f"check-data."
            )
        self.order = Order(store, self.rows)
        """Windows of a training step."""
        self._frames = store.frames
        if isinstance(self._frames, np.memmap):  # which is a third slower to index
            self._frames = self._frames.view(np.ndarray)
        self._offsets = np.arange(-context, horizon + 1) * frame_gap
        self._actions = self._labeled = None
        if store.action_space is not None:
            actions = store.actions(labeled)
            self._actions = torch.from_numpy(np.ma.getdata(actions))
            self._labeled = torch.from_numpy(known_rows(actions))
        self._state = None if store.state is None else torch.from_numpy(store.state)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Clip:
        """Return one window, as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, positions: list[int]) -> Clip:
        """Return the windows at these positions of `rows` as one batch."""
        return self.clip(self.rows[positions])

    def clip(self, rows: Int64[np.ndarray, " b"]) -> Clip:
        """Return the windows around these rows of the store as one batch.

        Raises:
            ValueError: a window extends past the end of its episode.
        """
        starts = self.store.starts[self.store.episode[rows]]
        ends = starts + self.store.lengths[self.store.episode[rows]]
        if (rows + self._offsets[-1] >= ends).any():
            raise ValueError("a window extends past the end of its episode")
        window = rows[:, None] + self._offsets  # [b, t] rows of the store, some before the episode's start
        inside = np.maximum(window, starts[:, None])
        batch = torch.from_numpy(self._frames[inside])
        index = torch.from_numpy(np.ascontiguousarray(rows))
        return Clip(
            frames=batch.permute(0, 1, 4, 2, 3),
            valid=torch.from_numpy(window == inside),
            index=index,
            action=None if self._actions is None else self._actions[index],
            labeled=None if self._labeled is None else self._labeled[index],
            state=None if self._state is None else self._state[index],
            states=None if self._state is None else self._state[torch.from_numpy(inside)],
            features=None
            if self._features is None
            else torch.from_numpy(self._features[inside].astype(np.float32)),
        )
