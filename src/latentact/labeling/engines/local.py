"""Encode in this process."""

from __future__ import annotations

from latentact.labeling.units import Job, ProcessRank, encode_units
from latentact.progress import Progress


def encode(job: Job, process: ProcessRank) -> None:
    """Write all missing files."""
    missing = job.missing()
    total = job.frames(range(len(job.units)))
    with Progress("encoding", total, "frames", done=total - job.frames(missing)) as progress:
        encode_units(job, missing, progress)
