"""Windows of frames over a `FrameStore`, never across two episodes, gathered a batch at a time."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import Dataset

from latentact.data.cache import FrameStore, known_rows
from latentact.errors import UserError
from latentact.types import Clip


def frame_gap(store: FrameStore, seconds: float) -> int:
    """Return how many frames apart two moments are that lie `seconds` apart; 0 seconds: one frame.

    Raises:
        UserError: that is less than half a frame.
    """
    frames = seconds * store.fps
    if seconds == 0:
        return 1
    if frames < 0.5:
        raise UserError(
            f"a gap of {seconds} s is less than half a frame of {store.path}, which has {store.fps:g} frames "
            f"per second; use at least {1 / store.fps:.3g} s, or 0 for one frame."
        )
    return max(1, round(frames))


class Clips(Dataset[Clip]):
    """Windows of frames at row - context*gap, ..., row, ..., row + horizon*gap, inside one episode.

    Use with `DataLoader(clips, batch_size=..., collate_fn=lambda clip: clip)`: a batch is one gather.

    Args:
        store: the data.
        episodes: numbers of the episodes to take windows from.
        frame_gap: frames between two moments of a window.
        context: moments before the current one; before the episode's start its first frame is repeated, and
            marked as not valid.
        horizon: moments after the current one; all of them lie inside the episode, a gap apart in time.
        labeled: episodes whose robot actions are seen; those of all others are hidden.
        features: numbers known of each row of the store ``[n, f]``.
        held_out: whether messages call the episodes held out.

    Raises:
        UserError: no episode is long enough for a window, or no two frames are as far apart as the gap says.
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
        transition = store.transitions(frame_gap)
        whole = np.isin(store.episode, chosen)
        for step in range(horizon):
            later = min(step * frame_gap, len(whole))
            whole[len(whole) - later :] = False
            whole[: len(whole) - later] &= transition[later:]
        self.rows: Int64[np.ndarray, " m"] = np.flatnonzero(whole)
        """Every row whose future lies inside its episode, each step a gap later."""
        if not len(self.rows):
            kind, longest = "held-out " if held_out else "", int(store.lengths[chosen].max(initial=0))
            remedy = "a smaller gap or longer videos"
            remedy = f"another split_seed, a larger held_out, {remedy}" if held_out else remedy
            if longest <= ahead:
                raise UserError(
                    f"a window needs {ahead + 1} frames (frame gap {frame_gap}), and the longest of "
                    f"{len(chosen)} {kind}episodes of {store.path} has {longest} frames; use {remedy}."
                )
            raise UserError(
                f"no two frames of the {len(chosen)} {kind}episodes of {store.path} are "
                f"{frame_gap / store.fps:g} s apart (frame gap {frame_gap}); see their times with latentact "
                f"check-data."
            )
        self._frames = np.asarray(store.frames)  # indexing a memmap is slower by a third
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

    def __getitem__(self, position: int) -> Clip:
        """Return one window, as a batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Clip:
        """Return the windows at these positions of `rows` as one batch."""
        return self.clip(self.rows[positions])

    def clip(self, rows: Int64[np.ndarray, " b"]) -> Clip:
        """Return the windows around these rows of the store as one batch.

        Raises:
            ValueError: the future of a row lies outside its episode.
        """
        starts = self.store.starts[self.store.episode[rows]]
        ends = starts + self.store.lengths[self.store.episode[rows]]
        if (rows + self._offsets[-1] >= ends).any():
            raise ValueError("a window would leave its episode")
        wanted = rows[:, None] + self._offsets
        inside = np.maximum(wanted, starts[:, None])
        batch = torch.from_numpy(self._frames[inside])
        index = torch.from_numpy(np.ascontiguousarray(rows))
        return Clip(
            frames=batch.permute(0, 1, 4, 2, 3),
            valid=torch.from_numpy(wanted == inside),
            index=index,
            action=None if self._actions is None else self._actions[index],
            labeled=None if self._labeled is None else self._labeled[index],
            state=None if self._state is None else self._state[index],
            states=None if self._state is None else self._state[torch.from_numpy(inside)],
            features=None
            if self._features is None
            else torch.from_numpy(self._features[inside].astype(np.float32)),
        )
