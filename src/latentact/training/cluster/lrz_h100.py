"""`cluster=lrz_h100`: SLURM with the H100 machines of the LRZ AI Systems in Munich.

Four GPUs of 94 GB per machine, at most two days, containers by enroot: `latentact ...
cluster=lrz_h100 cluster.container.runtime=enroot cluster.container.image=$HOME/latentact.sqsh`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from latentact.training.cluster.contract import CLUSTERS
from latentact.training.cluster.slurm import SlurmComputeConfig, SlurmConfig


@CLUSTERS.register("lrz_h100")
@dataclass(frozen=True, kw_only=True)
class LrzH100Config(SlurmConfig):
    """H100 machines of the LRZ AI Systems."""

    kind: str = "lrz_h100"
    compute: SlurmComputeConfig = field(
        default_factory=lambda: SlurmComputeConfig(
            gpus_per_node=4, cpus_per_task=16, time="2-00:00:00", partition="lrz-hgx-h100-94x4"
        )
    )
    """Resources that a job requests."""
