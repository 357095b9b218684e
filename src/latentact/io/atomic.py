"""Atomic writes of files and folders, and JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentact.errors import UserError

_UMASK = os.umask(0)
os.umask(_UMASK)


def make_shared(file: Path) -> None:
    """Give a file the permissions of any new file: those of safetensors are for their owner only."""
    file.chmod(0o666 & ~_UMASK)


@contextmanager
def atomic_dir(path: Path) -> Generator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an error.

    Raises:
        UserError: the disk is full; the temporary folder is removed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for file in partial.rglob("*.safetensors"):
            if not file.is_symlink():
                make_shared(file)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if disk_full(error):
            raise UserError(
                f"the disk of {path.parent} is full; free some space and re-run the command."
            ) from error
        raise


@contextmanager
def atomic_write(path: Path) -> Generator[Path]:
    """Yield the path of a temporary file that replaces `path` when the block ends without an error.

    Raises:
        UserError: the disk is full; the temporary file is removed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if disk_full(error):
            raise UserError(
                f"the disk of {path.parent} is full; free some space and re-run the command."
            ) from error
        raise


def disk_full(error: BaseException) -> bool:
    """Return whether an error, or the library error that wraps it, reports a full disk."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, is not JSON, or contains a number that is not finite.
    """
    try:
        return json.loads(Path(path).read_text(), parse_constant=_finite, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}); give the folder of a finished run.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, is not JSON, or is not an object.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must contain a JSON object, got {type(values).__name__}; delete it, or copy it again."
        )
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
