"""Training samples of vision-language-action models: prompts, latent actions, chunks of robot actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from latentact.data.store import FrameStore
from latentact.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VlaBatch:
    """Prompts and targets."""

    inputs: dict[str, Tensor]
    """Inputs of the vision-language model, for image and text."""
    latent: Shaped[Tensor, "b k *d"]
    """Codes int64 ``[b, k]``, or without codes float32 ``[b, k, d]``."""
    latent_mask: Bool[Tensor, " b"]
    """Whether the latent action exists."""
    state: Float32[Tensor, "b s"] | None = None
    """Robot state, in the dataset's units."""
    actions: Shaped[Tensor, "b l *a"] | None = None
    """Robot actions: int64 classes, or float32 in the robot's units."""
    action_mask: Bool[Tensor, "b l"] | None = None
    """Whether the action is labeled."""

    def to(self, device: torch.device | str) -> VlaBatch:
        """Return the batch on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(each) for name, each in value.items()}
            return value if value is None else value.to(device, non_blocking=True)

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})


class VlaSamples(Dataset):
    """One sample per given row.

    Args:
        store: frames, tasks and states.
        prepare_inputs: function from uint8 frames ``[b, 3, h, w]`` and task texts to the inputs of the
            vision-language model.
        rows: rows of the store.
        latent: codes int64 ``[n, k]`` or float32 ``[n, k, d]`` of every row.
        valid: whether the latent action of a row exists, ``[n]``.
        actions: robot actions of every row ``[n, *a]``; None: none are learned.
        known: whether the action of a row is labeled, ``[n]``.
        chunk: robot actions per sample, starting at the row and within its episode.
    """

    def __init__(
        self,
        store: FrameStore,
        prepare_inputs: Callable[[Tensor, list[str]], dict[str, Tensor]],
        rows: np.ndarray,
        *,
        latent: np.ndarray,
        valid: np.ndarray,
        actions: np.ndarray | None = None,
        known: np.ndarray | None = None,
        chunk: int = 1,
    ) -> None:
        if not len(rows):
            raise UserError("the data must have a step to learn from, got none; label more episodes.")
        self.store, self.prepare_inputs, self.rows = store, prepare_inputs, rows
        self.latent, self.valid, self.actions, self.known = latent, valid, actions, known
        self.ahead = np.arange(chunk)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> VlaBatch:
        """Return a batch."""
        return self.batch(self.rows[positions])

    def batch(
        self, rows: np.ndarray, *, images: np.ndarray | None = None, tasks: list[str] | None = None
    ) -> VlaBatch:
        """Return the samples of given rows.

        Args:
            rows: rows of the store.
            images: rows whose images are used instead.
            tasks: task texts instead of the data's.
        """
        store = self.store
        frames = torch.from_numpy(store.frames[rows if images is None else images]).permute(0, 3, 1, 2)
        texts = [store.task_texts[task] for task in store.task[rows]] if tasks is None else tasks
        batch = VlaBatch(
            inputs=self.prepare_inputs(frames, texts),
            latent=torch.from_numpy(self.latent[rows]),
            latent_mask=torch.from_numpy(self.valid[rows]),
            state=None if store.state is None else torch.from_numpy(store.state[rows]),
        )
        if self.actions is None or self.known is None:
            return batch
        episode = store.episode[rows]
        last = (store.starts[episode] + store.lengths[episode] - 1)[:, None]
        ahead = rows[:, None] + self.ahead
        inside = np.minimum(ahead, last)
        return replace(
            batch,
            actions=torch.from_numpy(self.actions[inside]),
            action_mask=torch.from_numpy((ahead <= last) & self.known[inside]),
        )
