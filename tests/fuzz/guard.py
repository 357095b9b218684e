"""Run the command line on unusual input and check its invariants."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import cli

LIMIT_S = 60
"""Seconds after which a command counts as hanging."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LIBRARIES = tuple(os.path.expanduser(f"~/.cache/{name}") for name in ("huggingface", "torch", "matplotlib"))
_watched: dict[str, Any] = {"allowed": (), "seen": None, "thread": 0}


class Hang(BaseException):
    """The command took longer than `LIMIT_S`."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Record writes outside the allowed folders, new processes and connections of the guarded thread."""
    seen = _watched["seen"]
    if seen is None or threading.get_ident() != _watched["thread"]:
        return
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
        seen.append(f"{event} {arguments[:2]}")
    elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & _WRITES
        ):
            _check(event, path, seen)
    elif event in (
        "os.mkdir",
        "os.remove",
        "os.rmdir",
        "os.rename",
        "os.symlink",
        "os.truncate",
        "shutil.rmtree",
    ):
        _check(event, arguments[1] if event in ("os.rename", "os.symlink") else arguments[0], seen)


def _check(event: str, path: Any, seen: list[str]) -> None:
    if not isinstance(path, str | bytes | os.PathLike):
        return
    full = os.path.abspath(os.fsdecode(path))
    # Compiled modules, folders that libraries create on import, unnamed files.
    exists = event == "os.mkdir" and os.path.isdir(full)
    usual = exists or "__pycache__" in full or full.startswith(_LIBRARIES) or full == tempfile.gettempdir()
    if not usual and not full.startswith(_watched["allowed"]):
        seen.append(f"{event} {full}")


sys.addaudithook(_audit)


@contextmanager
def _guarded(*allowed: Path) -> Iterator[list[str]]:
    def stop(*_: Any) -> None:
        raise Hang

    seen: list[str] = []
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    temporary = f"{tempfile.gettempdir()}/tmp"
    _watched.update(allowed=(*map(str, allowed), temporary, "/dev/"), seen=seen, thread=threading.get_ident())
    try:
        yield seen
    finally:
        _watched["seen"] = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(
    command: list[str | Path], *, box: Path, out: Path | None, mark: Path, resumed: bool = False
) -> list[str]:
    """Run a command and return the violated invariants.

    Args:
        command: arguments after `latentact`.
        box: folder of this case, the only folder besides the cache that may be written.
        out: output of the command; None: no output, or it writes into an existing folder.
        mark: file that exists if code in the input was executed.
        resumed: whether `out` existed before.
    """
    wrong: list[str] = []
    cache = Path(os.environ["LATENTACT_CACHE"])
    before = set(box.rglob("*"))
    try:
        with _guarded(box, cache) as seen:
            done = cli(*command)
    except Hang:
        return [f"no end after {LIMIT_S} s"]
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return ["".join(traceback.format_exception(error))[-3000:]]
    wrong += [f"wrote or started {what}" for what in seen]
    wrong += ["a pickle was executed"] if mark.exists() else []
    lines = done.stderr.splitlines()
    if "Traceback" in done.stdout + done.stderr:
        wrong.append("a traceback is printed")
    if done.returncode == 2:
        found = [line for line in lines if line.startswith("error: ")]
        if len(found) != 1 or lines[-1] != found[0]:
            wrong.append(f"not a one-sentence error: {done.stderr[-1500:]}")
        elif len(found[0]) > 1500:
            wrong.append(f"an error of {len(found[0])} characters: {found[0][:300]}")
        after = {path for path in box.rglob("*") if path.name != ".lock"} - before
        left = [str(path.relative_to(box)) for path in after]
        if out is not None and left and not resumed:
            wrong.append(f"left behind: {sorted(left)[:5]} by {done.stderr[-300:]}")
    elif done.returncode != 0:
        wrong.append(f"exit code {done.returncode}: {done.stderr[-1500:]}")
    if any("partial" in path.name or path.suffix == ".tmp" for path in set(box.rglob("*")) - before):
        wrong.append("a partial file or folder is left behind")
    return wrong


def emptied(box: Path) -> Path:
    """Return an empty folder for a case."""
    shutil.rmtree(box, ignore_errors=True)
    (box / "here").mkdir(parents=True)
    return box
