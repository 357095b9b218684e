"""Safetensors files: save, load, hash, and load into a module."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.errors import UserError
from latentact.io.atomic import make_shared
from latentact.io.records import parse_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
_ROWS = 1 << 20  # of a memory-mapped array, read together


def save_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and return its blake2b hash; with path None only compute the hash."""
    from safetensors import SafetensorError
    from safetensors.torch import save, save_file

    on_cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    addresses: set[int] = set()
    for name, tensor in on_cpu.items():  # safetensors refuses tensors that share memory, as tied weights do
        if tensor.numel() and tensor.data_ptr() in addresses:
            on_cpu[name] = tensor.clone()
        addresses.add(tensor.data_ptr())
    if path is None:
        return hashlib.blake2b(save(on_cpu), digest_size=16).hexdigest()
    try:
        save_file(on_cpu, path)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):  # such as a full disk
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    make_shared(path)
    return weights_hash(path)


def weights_hash(path: Path) -> str:
    """Return the hash of a file written by `save_tensors`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Load a safetensors file onto the CPU.

    Args:
        path: file.
        names: tensors to load, ignoring those absent from the file; None: all.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file; its content is never executed.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} is missing; give a folder written by a finished run or `save_pretrained`.")
    try:
        if names is None:
            return load_file(path)
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names if name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, *BROKEN) as error:  # BROKEN: invalid shapes and offsets
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); create or download it again."
        ) from error


def load_about(path: Path) -> Any:
    """Return the JSON metadata of a safetensors file under `latentact`; None if it has none.

    Raises:
        UserError: the metadata is not JSON.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        text = (opened.metadata() or {}).get("latentact")
    return None if text is None else parse_json(text, str(path))


def to_arrays(tensors: Mapping[str, Tensor], path: Path) -> dict[str, np.ndarray]:
    """Convert the tensors of a file to numpy arrays.

    Raises:
        UserError: numpy does not support the dtype of a tensor.
    """
    arrays = {}
    for name, tensor in tensors.items():
        try:
            arrays[name] = tensor.numpy()
        except (RuntimeError, TypeError) as error:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path} must contain arrays of a numpy dtype, got {name!r} of {dtype}; create it again."
            ) from error
    return arrays


def require_array(
    path: Path, name: str, array: np.ndarray | None, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    """Raise a UserError unless an array of a file has this shape, one of these dtypes and finite values."""
    expected = f"{' or '.join(dtypes)} {list(shape)}"
    if array is None:
        raise UserError(f"{path} must contain {name!r} of {expected}, got none; create the file again.")
    if array.shape != shape or str(array.dtype) not in dtypes:
        raise UserError(
            f"{path} must contain {name!r} of {expected}, got {array.dtype} {list(array.shape)}; create the "
            f"file again."
        )
    parts = (array[i : i + _ROWS] for i in range(0, len(array), _ROWS))
    if array.dtype.kind == "f" and not all(np.isfinite(part).all() for part in parts):
        raise UserError(f"{path} must contain finite numbers, got NaN or inf in {name!r}; create it again.")


BROKEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""Exceptions raised by building a network from inconsistent settings."""


@contextmanager
def settings_of(path: Path) -> Generator[None]:
    """Convert exceptions from building a network with the settings of a file to a UserError."""
    try:
        yield
    except BROKEN as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path} is damaged, or its settings are inconsistent ({type(error).__name__}: {first}); give "
            f"the folder of a finished run, or download it again."
        ) from error


def load_weights(module: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into a module after checking all of them.

    Raises:
        UserError: names or shapes do not match those of the module, or a value is not finite.
    """
    require_weights(module, tensors, path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{path} must contain finite numbers, got NaN or inf in {name!r}; create it again."
            )
    on_meta = any(tensor.is_meta for tensor in module.state_dict().values())
    module.load_state_dict(tensors, assign=on_meta)


def require_weights(module: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that tensors are the weights of a module, which may be on the meta device.

    Raises:
        UserError: names, shapes or dtypes do not match those of the module.
    """
    expected = module.state_dict()
    common = sorted(expected.keys() & tensors.keys())
    problems = {
        "lacks": sorted(expected.keys() - tensors.keys()),
        "has unknown": sorted(tensors.keys() - expected.keys()),
        "has a wrong shape for": [k for k in common if expected[k].shape != tensors[k].shape],
        "has a wrong dtype for": [
            k for k in common if expected[k].is_floating_point() != tensors[k].is_floating_point()
        ],
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{path} {problem} {names[0]!r}{more}; the weights do not match the settings next to them."
            )
