"""Tensors as safetensors: save, load, hash, and put into a module."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentact.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"


def save_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors and return the blake2b hash of the file; without a path only the hash."""
    from safetensors.torch import save

    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    if path is not None:
        path.write_bytes(data)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


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
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); make or download it again."
        ) from error


def load_weights(module: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors into a module, all of them or none.

    Raises:
        UserError: names or shapes do not match those of the module.
    """
    require_weights(module, tensors, path)
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
