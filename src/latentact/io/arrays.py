"""Load npy and npz files that may be damaged."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from latentact.errors import UserError

DAMAGED = (
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions that numpy raises for a damaged file; it parses headers as Python source."""


def load_npy(path: Path, remedy: str) -> np.ndarray:
    """Return the array of an npy file, memory-mapped; the file stays as it is, whatever is assigned to it.

    Args:
        path: file.
        remedy: advice at the end of error messages.

    Raises:
        UserError: the file is missing or damaged; its content is never executed.
    """
    try:
        return np.lib.format.open_memmap(path, mode="c")
    except DAMAGED as error:
        raise _damaged(path, error, remedy) from error


def load_npz(path: Path, remedy: str, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file by name.

    Args:
        path: file.
        remedy: advice at the end of error messages.
        names: arrays to load, ignoring those absent from the file; None: all.

    Raises:
        UserError: the file is missing or damaged; its content is never executed.
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
