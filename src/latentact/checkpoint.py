"""Checkpoint folders of json and safetensors: written whole or not at all, never a pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentact.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place when the block ends without an error.

    Raises:
        UserError: the disk is full; nothing is left behind.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if disk_full(error):
            raise UserError(
                f"the disk of {path.parent} is full; free some space and run the same command again."
            ) from error
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a new file name beside `path` that takes its place when the block ends without an error.

    Raises:
        UserError: the disk is full; nothing is left behind.
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
                f"the disk of {path.parent} is full; free some space and run the same command again."
            ) from error
        raise


def disk_full(error: BaseException) -> bool:
    """Whether an error says that no space is left, also when a library rewrote it."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def write_json(path: Path, values: Any) -> None:
    """Write json atomically."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read json.

    Raises:
        UserError: the file is missing or is not json.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); give the folder of a finished run.") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors and return the blake2b hash of the file."""
    from safetensors.torch import save

    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    path.write_bytes(data)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


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
            f"{path} is not a whole safetensors file ({error}); download or train it again."
        ) from error


def load_weights(module: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors into a module, all of them or none.

    Raises:
        UserError: names or shapes do not match those of the module.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    for what, names in (("lacks", missing), ("has unknown", extra), ("has a wrong shape for", sorted(wrong))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} {what} {names[0]!r}{more}; its config.json belongs to another model.")
    module.load_state_dict(tensors)


def require_device(device: str) -> None:
    """Check that torch can compute on a device.

    Raises:
        UserError: it is unknown, or not there.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device, False):
        usable = ", ".join(name for name, found in there.items() if found)
        raise UserError(f"device is {device!r}; torch can use {usable} here.")


def push_folder(write: Callable[[Path], None], repo_id: str, private: bool | None) -> str:
    """Upload the checkpoint that `write` makes to the Hugging Face hub and return its address."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        write(Path(folder))
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
        return HfApi().upload_folder(repo_id=repo_id, folder_path=folder)


def resolve_folder(where: str | Path, needed: str = "config.json") -> Path:
    """Return the local folder of a checkpoint: a path as it is, a hub id downloaded into the hub's cache.

    Raises:
        UserError: there is no such folder, or it is not a checkpoint; a pickle is refused unread.
    """
    path = Path(where)
    if path.is_dir():
        if not (path / needed).is_file():
            raise UserError(f"{path} holds no {needed}; give the folder of a finished run.")
        return path
    if path.exists():
        raise UserError(
            f"{path} is a file; checkpoints are folders with config.json and {WEIGHTS} "
            f"(pickles are never loaded)."
        )
    name = str(where)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} does not exist; give a checkpoint folder or a hub id such as owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is neither a folder nor a reachable hub repository ({first}).") from error
