"""Detect which of several training processes died: each holds a lock in the run folder while it trains."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from latentact.errors import UserError
from latentact.training.run_folder import Busy

_DYING_S = 5.0
"""Seconds in which a process whose connection is lost can still hold its lock."""


@contextmanager
def training_lock(out: Path, rank: int, world: int) -> Generator[None]:
    """Hold the lock of this process.

    Raises:
        Busy: another run trains in the folder.
        UserError: inside, the connection to another process was lost; it is named.
    """
    try:
        lock = _lock(out, rank).acquire(timeout=0)
    except Timeout as error:
        raise Busy(f"another process is training in {out}; wait for it, or choose another out=.") from error
    with lock:
        try:
            yield
        except RuntimeError as error:
            if world == 1 or not _is_lost_connection(error):
                raise
            name = " and ".join(_dead(out, rank, world)[:3]) or f"other than {rank}"
            raise UserError(
                f"process {name} of {world} has stopped before the training was done. See its output, and "
                f"re-run the command to resume."
            ) from error


def _dead(out: Path, rank: int, world: int) -> list[str]:
    """Return the ranks of other processes without a lock; a dying process can lose its connection first."""
    deadline = time.monotonic() + _DYING_S
    while True:
        dead = [str(other) for other in range(world) if other != rank and _is_free(out, other)]
        if dead or time.monotonic() > deadline:
            return dead
        time.sleep(0.05)


def _is_lost_connection(error: RuntimeError) -> bool:
    # Gloo has no error class of its own.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def _lock(out: Path, rank: int) -> FileLock:
    return FileLock(out / (f".lock-{rank}" if rank else ".lock"))


def _is_free(out: Path, rank: int) -> bool:
    try:
        with _lock(out, rank).acquire(blocking=False):
            return True
    except Timeout:
        return False
