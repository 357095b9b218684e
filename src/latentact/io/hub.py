"""Checkpoints on the Hugging Face hub: upload a folder, resolve a path or hub id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from latentact.errors import UserError
from latentact.io.tensors import WEIGHTS


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
