"""Read files of `torch.save` without running anything that they name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from latentact.errors import UserError


class _Inert:
    """Takes the place of an object that only the program that pickled it understands; forgets everything."""

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
    """Read the dict that `torch.save` wrote to a file, without running anything that the file names.

    Tensors, plain values and containers come back as they were; settings and loggers of the programs that
    published models were trained with come back empty.

    Raises:
        UserError: the file is missing, damaged, no dict, or names a class or function that is not known here.
    """
    import pickle
    import zipfile

    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    damaged = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError)
    broken = (*damaged, AssertionError, ArithmeticError, MemoryError, struct.error, pickle.UnpicklingError)
    try:
        zipped = zipfile.is_zipfile(path)
        if not zipped:
            with path.open("rb") as file:
                if file.read(1) == b"\x80":
                    raise UserError(
                        f"{path} is a bare pickle, which can run code, so it was not read; save its weights "
                        f"again with `torch.save` of torch 1.6 or newer."
                    )
        else:
            with zipfile.ZipFile(path) as archive:
                if member := archive.testzip():
                    raise ValueError(f"the checksum of {member} is wrong")
        named = get_unsafe_globals_in_checkpoint(path) if zipped else []
        strange = [
            name
            for name in named
            if name.partition(".")[0] not in _INERT_MODULES and name not in _INERT_NAMES
        ]
        if strange:
            raise UserError(
                f"{path} is a pickle that names {strange[0]!r}, which no published model needs; it was not "
                f"loaded, because such a file can run code."
            )
        with safe_globals([(_INERT_NAMES.get(name, _Inert), name) for name in named]):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except (*broken, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a whole file of `torch.save` with plain weights; download it again."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not named weights; give another file.")
    return values
