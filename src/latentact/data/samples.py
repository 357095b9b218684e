"""Training samples of policies (observations, chunks of targets) and decoders (inputs, robot actions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Shaped, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from latentact.data.order import Order
from latentact.errors import UserError

if TYPE_CHECKING:
    from latentact.data.store import FrameStore


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Observations and targets; `o` observed frames, latest last; `l` targets ahead."""

    frames: UInt8[Tensor, "b o c h w"]
    """0..255."""
    state: Float32[Tensor, "b s"] | None
    """Robot state at the latest frame, in the dataset's units."""
    words: Float32[Tensor, "b v"]
    """Count of each vocabulary word in the task text, float32 ``[b, v]``; v is 0 without a vocabulary."""
    target: Shaped[Tensor, "b l f"]
    """float32 values or int64 classes."""
    mask: Bool[Tensor, "b l"]
    """Whether the target exists."""
    guide: Float32[Tensor, "b g d"] | None = None
    """LAM tokens of the steps ahead, for a guided policy; NaN without a guide."""

    def to(self, device: torch.device | str) -> PolicyBatch:
        """Return the batch on `device`."""
        moved: dict[str, Any] = {
            k: v if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()
        }
        return PolicyBatch(**moved)


class PolicySamples(Dataset):
    """One sample per row whose first target exists; all of its targets are from the same episode.

    Args:
        store: frames and states.
        target: what to predict at each row of the store, float32 or int64 ``[n, f]``.
        exists: bool ``[n]``; False hides a row's target.
        frames: observed frames, `stride` apart; before an episode's start the first frame is repeated.
        chunk: targets to predict, `stride` rows apart.
        stride: rows between observed frames and between targets.
        words: vocabulary of the task text.
        guide: LAM tokens of each row ``[n, f]`` and whether they exist ``[n]``.
        offsets: offsets in rows from the current row to the tokens that guide it; before an episode's first
            and beyond its last token, that token repeats.
    """

    def __init__(
        self,
        store: FrameStore,
        *,
        target: np.ndarray,
        exists: np.ndarray,
        frames: int = 1,
        chunk: int = 1,
        stride: int = 1,
        words: tuple[str, ...] = (),
        guide: tuple[np.ndarray, np.ndarray] | None = None,
        offsets: tuple[int, ...] = (),
    ) -> None:
        self.store, self.target, self.exists = store, target, exists & store.usable
        self.rows = np.flatnonzero(self.exists)
        if not len(self.rows):
            raise UserError(
                "the data must have a step with a target to learn from, got none; label more episodes."
            )
        self.order = Order(store, self.rows)
        """Samples of a training step."""
        self.past = np.arange(1 - frames, 1) * stride
        self.ahead = np.arange(chunk) * stride
        self.guide = guide[0] if guide else None
        self.offsets = np.asarray(offsets, np.int64)
        if guide:
            places = np.arange(len(guide[1]))
            self.first_token = np.minimum.reduceat(np.where(guide[1], places, len(places)), store.starts)
            self.last_token = np.maximum.reduceat(np.where(guide[1], places, -1), store.starts)
        counts = [count_words(task, words) for task in store.task_texts]
        self.words = np.asarray(counts, np.float32).reshape(len(counts), len(words))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> PolicyBatch:
        """Return a batch."""
        return self.batch(self.rows[positions])

    def batch(self, rows: np.ndarray) -> PolicyBatch:
        """Return the samples of given rows of the store."""
        store = self.store
        episode = store.episode[rows]
        first = store.starts[episode][:, None]
        last = first + store.lengths[episode][:, None] - 1
        ahead = rows[:, None] + self.ahead
        inside = np.minimum(ahead, last)
        frames = torch.from_numpy(store.frames[np.maximum(rows[:, None] + self.past, first)])
        return PolicyBatch(
            frames=frames.permute(0, 1, 4, 2, 3),
            state=None if store.state is None else torch.from_numpy(store.state[rows]),
            words=torch.from_numpy(self.words[store.task[rows]]),
            target=torch.from_numpy(self.target[inside]),
            mask=torch.from_numpy((ahead <= last) & self.exists[inside]),
            guide=None if self.guide is None else torch.from_numpy(self._tokens(self.guide, rows)),
        )

    def _tokens(self, guide: np.ndarray, rows: np.ndarray) -> np.ndarray:
        episode = self.store.episode[rows]
        first, last = self.first_token[episode][:, None], self.last_token[episode][:, None]
        tokens = guide[np.minimum(np.maximum(rows[:, None] + self.offsets, first), last)]
        return np.where(last[..., None] >= 0, tokens, np.float32(np.nan))


@dataclass(frozen=True)
class LabeledBatch:
    """Inputs of a decoder and the robot actions to predict."""

    inputs: Tensor
    """float32 ``[b, f]``: normalized latent actions, or features."""
    state: Tensor | None
    """Normalized robot state ``[b, s]``."""
    actions: Tensor
    """Robot actions: int64 classes or float32, ``[b, ...]``."""

    def to(self, device: torch.device | str) -> LabeledBatch:
        """Return the batch on `device`."""
        state = None if self.state is None else self.state.to(device)
        return LabeledBatch(self.inputs.to(device), state, self.actions.to(device))


class LabeledRows(Dataset):
    """A `LabeledBatch` of all rows, in memory."""

    def __init__(self, inputs: Tensor, state: Tensor | None, actions: Tensor) -> None:
        self.inputs, self.state, self.actions = inputs, state, actions

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.inputs)

    def __getitems__(self, positions: list[int]) -> LabeledBatch:
        """Return a batch."""
        state = None if self.state is None else self.state[positions]
        return LabeledBatch(self.inputs[positions], state, self.actions[positions])


def vocabulary(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words that are not in every task, sorted; empty for a single task."""
    texts = [set(task.lower().split()) for task in tasks]
    return tuple(sorted(set.union(*texts) - set.intersection(*texts))) if texts else ()


def count_words(task: str, words: tuple[str, ...]) -> list[float]:
    """Return how often each of `words` occurs in a task text; unknown words are ignored."""
    present = task.lower().split()
    return [float(present.count(word)) for word in words]
