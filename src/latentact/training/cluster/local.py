"""`cluster=local`: in this process, or in those that `torchrun` or `srun` started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentact.errors import UserError
from latentact.training.cluster.contract import CLUSTERS, ComputeConfig, trainings

_LAUNCHERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "NODE_RANK", "GROUP_RANK")
"""Environment variables that give a process its rank among several machines."""


@CLUSTERS.register("local")
@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """This machine."""

    kind: str = "local"
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Number of training processes."""

    def launch(self, command: str, run: Callable[[Any, Path], Any], config: Any, out: Path) -> Any:
        """Run the stage.

        Raises:
            UserError: the run needs several machines and was not started on them.
        """
        nodes = max((training.num_nodes for training in trainings(config)), default=1)
        if nodes > 1 and not any(name in os.environ for name in _LAUNCHERS):
            raise UserError(
                f"cluster.compute.num_nodes must be 1 with cluster=local, got {nodes}. Give "
                f"cluster=slurm, or start the command on every machine with torchrun."
            )
        return run(config, out)
