"""Read `torch.save` files without executing code."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from latentact.errors import UserError


class _Inert:
    """Placeholder for an object of the program that wrote the pickle; discards its state."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _empty_dict(*_: Any) -> dict:
    return {}


def _empty_list(*_: Any) -> list:
    return []


_INERT_MODULES = ("config", "doy", "omegaconf", "typing")
_INERT_NAMES: dict[str, Any] = {
    **{f"builtins.{name}": _Inert for name in ("bool", "dict", "float", "int", "list", "object", "str")},
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"), _Inert),
    "collections.defaultdict": _empty_dict,
    "collections.deque": _empty_list,
    "pathlib.PosixPath": _Inert,
}


def read_pickled(path: Path) -> dict[str, Any]:
    """Read a dict written by `torch.save` without executing code.

    Tensors, plain values and containers are restored; settings and loggers of the programs that trained
    published models become empty placeholders.

    Raises:
        UserError: the file is missing or damaged, is not a dict, or references a class or function that is
            not on the allow-list.
    """
    import pickle
    import zipfile

    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    damaged = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        struct.error,
        zipfile.BadZipFile,
    )
    try:
        zipped = zipfile.is_zipfile(path)
        if not zipped:
            with path.open("rb") as file:
                if file.read(1) == b"\x80":
                    raise UserError(
                        f"{path} is a bare pickle, which can execute code, so it was not read; save its "
                        f"weights again with `torch.save` of torch 1.6 or later."
                    )
        else:
            with zipfile.ZipFile(path) as archive:
                if member := archive.testzip():
                    raise ValueError(f"the checksum of {member} is wrong")
        named = get_unsafe_globals_in_checkpoint(path) if zipped else []
        unknown = [
            name
            for name in named
            if name.partition(".")[0] not in _INERT_MODULES and name not in _INERT_NAMES
        ]
        if unknown:
            raise UserError(
                f"{path} is a pickle that refers to {unknown[0]!r}, which no published model needs; it was "
                f"not loaded because such a file can execute code."
            )
        with safe_globals([(_INERT_NAMES.get(name, _Inert), name) for name in named]):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except damaged as error:
        raise UserError(
            f"{path} is not a complete `torch.save` file with plain weights; download it again."
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must contain a dict of weights, got {type(values).__name__}; give a checkpoint."
        )
    return values
