"""The contract of clusters: settings, and `launch`, which runs a stage there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from latentact.config import Between, check_bounds
from latentact.registry import Registry
from latentact.training.settings import TrainingConfig

CLUSTERS: Registry[type[Cluster]] = Registry("cluster", "latentact.training.cluster", "latentact.clusters")
"""Clusters by name, as in `cluster=NAME`."""


class Cluster(Protocol):
    """A kind of cluster: a frozen dataclass of settings."""

    compute: ComputeConfig

    def launch(self, command: str, run: Callable[[Any, Path], Any], config: Any, out: Path) -> Any:
        """Return `run(config, out)`, or a placeholder if the stage runs later: a dataclass with a `__str__`.

        Args:
            command: name of the command (`train-lam`), to be repeated on the cluster.
            run: the stage.
            config: its settings, a `ClusterStage`.
            out: its run folder.
        """
        ...


class ClusterStage:
    """Base of the settings of a stage that has the setting `cluster`."""

    ONE_PROCESS: ClassVar[bool] = False
    """Whether it trains several small models one after another, for which more processes are of no use."""

    @property
    def only_plans(self) -> bool:
        """Whether the stage writes nothing, so that it runs here and at once."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Size of a training; `training.num_nodes` and `training.devices` follow it."""

    num_nodes: Annotated[int, Between(1, 4096)] = 1
    """Machines."""
    gpus_per_node: Annotated[int, Between(1, 1024)] = 1
    """Processes per machine, each with a GPU of its own; with training.device=cpu, without one."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)


def trainings(config: Any) -> list[TrainingConfig]:
    """Return the settings of every training of a stage."""
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    return [value for value in values if isinstance(value, TrainingConfig)]
