"""Checkpoint folders of json and safetensors: written whole or not at all, never a pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
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
    path = resolve_path(where)
    if path.is_file():
        raise UserError(
            f"{path} is a file; checkpoints are folders with config.json and {WEIGHTS} "
            f"(pickles are never loaded)."
        )
    if not (path / needed).is_file():
        raise UserError(f"{path} holds no {needed}; give the folder of a finished run.")
    return path


def resolve_path(where: str | Path, patterns: tuple[str, ...] = ("*.json", "*.safetensors")) -> Path:
    """Return a local file or folder as it is, a hub id as a folder in the hub's cache.

    Args:
        where: path or hub id.
        patterns: files of a hub repository that are downloaded.

    Raises:
        UserError: there is neither such a path nor such a repository.
    """
    if Path(where).exists():
        return Path(where)
    name = str(where)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} does not exist; give a checkpoint folder or a hub id such as owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is neither a folder nor a reachable hub repository ({first}).") from error
