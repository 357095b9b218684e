"""How a model is trained: the way into the loop of `training/loop.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.data import Dataset

from latentact.training.settings import TrainingConfig


@runtime_checkable
class Trainable(Protocol):
    """What `fit` trains: a module whose `loss` takes a batch of its dataset."""

    def loss(self, batch: Any, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimize and scalars to log."""
        ...


def fit(
    model: nn.Module,
    data: Dataset,
    config: TrainingConfig,
    out: Path,
    evaluate: Callable[[bool], dict[str, float]] | None = None,
) -> None:
    """Train `model` in place; goes on from the newest checkpoint in `out` if there is one.

    Args:
        model: a module with `loss(batch)` (`Trainable`).
        data: dataset with `__getitems__(positions) -> batch` and a length.
        config: how.
        out: run folder; gets `metrics.csv`, `tensorboard/` and `checkpoints/`.
        evaluate: called with the model in evaluation mode and whether it is the last time; what it returns
            is logged.
    """
    from latentact.training.loop import train  # Lightning takes seconds to import

    train(model, data, config, out, evaluate)
