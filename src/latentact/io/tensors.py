"""Tensors as safetensors: save, load, hash, and put into a module."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.errors import UserError
from latentact.io.records import parse_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"


def save_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors and return the blake2b hash of the file; without a path only the hash."""
    from safetensors.torch import save, save_file

    on_cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    if path is None:
        return hashlib.blake2b(save(on_cpu), digest_size=16).hexdigest()
    save_file(on_cpu, path)
    return weights_hash(path)


def weights_hash(path: Path) -> str:
    """Return the hash of a file that `save_tensors` wrote."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors onto the CPU.

    Raises:
        UserError: the file is missing, truncated or something else; nothing in it is executed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} is missing; give a folder that a finished run or `save_pretrained` wrote.")
    try:
        return load_file(path)
    except (SafetensorError, *BROKEN) as error:  # of shapes and offsets that no tensor has, too
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); make or download it again."
        ) from error


def load_about(path: Path) -> Any:
    """Return the JSON that a safetensors file says about itself under `latentact`; None without it.

    Raises:
        UserError: it is not JSON.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        text = (opened.metadata() or {}).get("latentact")
    return None if text is None else parse_json(text, str(path))


def to_arrays(tensors: Mapping[str, Tensor], path: Path) -> dict[str, np.ndarray]:
    """Return tensors of a file as arrays.

    Raises:
        UserError: one is of a kind that numpy does not have.
    """
    arrays = {}
    for name, tensor in tensors.items():
        try:
            arrays[name] = tensor.numpy()
        except (RuntimeError, TypeError) as error:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path} must hold plain numbers, got {name!r} of {kind}; make the file again."
            ) from error
    return arrays


def require_array(
    path: Path, name: str, array: np.ndarray | None, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    """Raise a UserError unless an array of a file has this shape, one of these dtypes and finite numbers."""
    wanted = f"{' or '.join(dtypes)} {list(shape)}"
    if array is None:
        raise UserError(f"{path} must hold {name!r} of {wanted}, got none; make the file again.")
    if array.shape != shape or str(array.dtype) not in dtypes:
        raise UserError(
            f"{path} must hold {name!r} of {wanted}, got {array.dtype} {list(array.shape)}; make the file "
            f"again."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{path} must hold finite numbers, got others in {name!r}; make the file again.")


BROKEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What building a network from settings that do not belong together raises."""


@contextmanager
def settings_of(path: Path) -> Iterator[None]:
    """Turn what a network raises that is built from the settings of a file into a UserError."""
    try:
        yield
    except BROKEN as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path} is damaged, or its settings make no model ({type(error).__name__}: {first}); give the "
            f"folder of a finished run, or download it again."
        ) from error


def load_weights(module: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors into a module, all of them or none.

    Raises:
        UserError: names or shapes do not match those of the module, or a number is not finite.
    """
    require_weights(module, tensors, path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: {name!r} holds numbers that are not finite.")
    on_meta = any(tensor.is_meta for tensor in module.state_dict().values())
    module.load_state_dict(tensors, assign=on_meta)


def require_weights(module: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not the weights of a module, which may be on the meta device.

    Raises:
        UserError: names, shapes or kinds of numbers do not match those of the module.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    both = sorted(own.keys() & tensors.keys())
    wrong = [k for k in both if own[k].shape != tensors[k].shape]
    kinds = [k for k in both if own[k].is_floating_point() != tensors[k].is_floating_point()]
    for what, names in (
        ("lacks", missing),
        ("has unknown", extra),
        ("has a wrong shape for", wrong),
        ("has numbers of a wrong kind for", kinds),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{path} {what} {names[0]!r}{more}; it belongs to another model than its settings say."
            )
