"""`fit` trains any module with a `loss`; the loop is in `training/loop.py`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn
from torch.utils.data import Dataset

from latentact.errors import UserError
from latentact.training.settings import TrainingConfig


@runtime_checkable
class Trainable(Protocol):
    """A module that `fit` trains.

    A module may also have `parameter_groups() -> list[ParameterGroup]`: its other parameters are trained with
    the settings of `TrainingConfig`.
    """

    def loss(self, batch: Any, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimize and scalars to log."""
        ...


class ParameterGroup(TypedDict):
    """Parameters with their own learning rate or weight decay."""

    params: list[nn.Parameter]
    lr_factor: NotRequired[float]
    """Factor of the learning rate; 1 by default."""
    weight_decay: NotRequired[float]
    """AdamW's weight decay; `TrainingConfig.weight_decay` by default."""


def fit(
    model: nn.Module,
    data: Dataset,
    config: TrainingConfig,
    out: Path,
    evaluate: Callable[[bool], dict[str, float]] | None = None,
    *,
    augments: Collection[str] = (),
    state_std: Tensor | None = None,
) -> None:
    """Train `model` in place; resume from the newest checkpoint in `out`, if there is one.

    With several processes, it returns only in the first one.

    Args:
        model: a module with `loss(batch)` (`Trainable`).
        data: dataset with `__getitems__(positions) -> batch` and a length. Where it has `order(seed, step,
            batch_size) -> positions`, it chooses the samples of a step; otherwise they are drawn uniformly.
        config: settings of training.
        out: run folder for `metrics.csv`, `tensorboard/` and `checkpoints/`.
        evaluate: called with the model in evaluation mode and whether this is the last call; returns scalars
            to log.
        augments: inputs that `config.augment` may change: "frames", "state".
        state_std: standard deviations of a policy's state in the data, for noise on it; ``[s]``.

    Raises:
        UserError: `config.augment` changes other inputs, the training diverges, or another process trains in
            `out`.
    """
    from latentact.training.loop import train  # Lightning takes seconds to import

    if refused := config.augment.inputs - {*augments}:
        named = f"only the {' and '.join(augments)}" if augments else "no input"
        raise UserError(
            f"training.augment must not change the {' and '.join(sorted(refused))}, because {named} of "
            f"this model can be augmented, got {config.augment}. Set the others to 0."
        )
    if config.smoke_test:
        config = replace(config, steps=min(config.steps, 2))
    train(model, data, config, out, evaluate, state_std)
