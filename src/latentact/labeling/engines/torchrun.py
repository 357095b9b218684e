"""Encode in the processes that torchrun or srun has started: each takes the units of its rank.

Processes meet through files only. Each holds a lock while it works, so that the first process notices when
another has died, on this machine or another one with the same file system.
"""

from __future__ import annotations

import logging
import time

from filelock import FileLock, Timeout

from latentact.errors import UserError
from latentact.labeling.units import Job, ProcessRank, encode_units
from latentact.progress import Progress

log = logging.getLogger(__name__)

GRACE_S = 60.0
"""Seconds that a process may take to start; after that it counts as dead."""


def encode(job: Job, process: ProcessRank) -> None:
    """Write the missing files of this rank; the first rank then waits for those of the others.

    Raises:
        UserError: another process has died before its files were written.
    """
    mine = range(process.rank, len(job.units), process.world_size)
    with _lock(job, process.rank):
        missing = [unit for unit in job.missing() if unit in mine]
        total = job.frames(mine)
        with Progress("encoding", total, "frames", done=total - job.frames(missing)) as progress:
            encode_units(job, missing, progress)
    if process.rank == 0:
        _wait(job, process)


def _wait(job: Job, process: ProcessRank) -> None:
    """Return when no file is missing."""
    absent_since: dict[int, float] = {}
    logged = False
    while missing := job.missing():
        if not logged:
            log.info("waiting for other processes to write %d files", len(missing))
        logged = True
        now = time.monotonic()
        for rank in {unit % process.world_size for unit in missing}:
            if _works(job, rank):
                absent_since.pop(rank, None)
            elif now - absent_since.setdefault(rank, now) > GRACE_S and job.missing() == missing:
                raise UserError(
                    f"process {rank} of {process.world_size} has stopped before its work was done. Check its "
                    f"output, and re-run the command; finished work is kept."
                )
        time.sleep(0.2)


def _lock(job: Job, rank: int) -> FileLock:
    return FileLock(job.parts / f"rank-{rank}.lock")


def _works(job: Job, rank: int) -> bool:
    """Return whether the process of a rank holds its lock."""
    try:
        with _lock(job, rank).acquire(blocking=False):
            return False
    except Timeout:
        return True
