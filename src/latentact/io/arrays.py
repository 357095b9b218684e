"""Arrays as npy and npz: load files that may be damaged."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from latentact.errors import UserError

DAMAGED = (
    *(OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError, MemoryError),
    *(RuntimeError, SyntaxError, tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)
"""What numpy raises on a damaged file, whose header it parses as Python source."""


def load_npy(path: Path, remedy: str) -> np.ndarray:
    """Return the array of an npy file, mapped from the disk.

    Args:
        path: file.
        remedy: what messages advise to do about a damaged file.

    Raises:
        UserError: it is missing or damaged; nothing in it is executed.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except DAMAGED as error:
        raise _damaged(path, error, remedy) from error


def load_npz(path: Path, remedy: str, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Return arrays of an npz file; `names`: the ones to return where it has them, all without.

    Args:
        path: file.
        remedy: what messages advise to do about a damaged file.
        names: of the arrays.

    Raises:
        UserError: it is missing or damaged; nothing in it is executed.
    """
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files if names is None or name in names}
    except DAMAGED as error:
        raise _damaged(path, error, remedy) from error


def _damaged(path: Path, error: Exception, remedy: str) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist; {remedy}.")
    return UserError(f"{path} is damaged ({' '.join(str(error).split())}); {remedy}.")
