"""Stop on request of the scheduler: signal USR1, then exit code 75 ("try again").

Training finishes its step, saves a checkpoint and stops. Everything else stops at once, as after Ctrl-C.
Re-run the command to resume.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h; the job script requeues a job that ends with it."""
MARK = "LATENTACT_PREEMPTED"
"""Environment variable with a file to create when stopping. `srun` kills the other processes when the first
one ends, and then returns their exit code."""


@dataclass
class _State:
    deferred: bool = False
    requested: bool = False


_state = _State()


def watch() -> None:
    """Install the handler of USR1; call it before slow imports, as the signal would kill the process."""
    if threading.current_thread() is threading.main_thread():
        _state.deferred = _state.requested = False
        signal.signal(signal.SIGUSR1, _on_signal)


def _on_signal(number: int, frame: Any) -> None:
    if not _state.deferred:
        stop()
    _state.requested = True


@contextmanager
def deferred() -> Generator[None]:
    """Defer the stop within the block, whose body polls `requested`."""
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False


def stop() -> NoReturn:
    """End the process with the exit code of a preempted one."""
    if mark := os.environ.get(MARK):
        Path(mark).touch()
    sys.exit(EXIT_CODE)


def requested() -> bool:
    """Return whether the signal was received."""
    return _state.requested
