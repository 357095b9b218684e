"""Checkpoints and datasets on the Hugging Face hub: upload files, resolve a path or hub id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from latentact.errors import UserError
from latentact.io.tensors import WEIGHTS


def push_folder(write: Callable[[Path], None], repo_id: str, private: bool | None) -> str:
    """Upload the folder that `write` fills to the Hugging Face hub and return its URL."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        write(Path(folder))
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
        return HfApi().upload_folder(repo_id=repo_id, folder_path=folder)


def check_repo_id(repo_id: str) -> None:
    """Raise a UserError unless `repo_id` is a valid hub id with an owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"REPO must be a hub id such as owner/name, got {repo_id!r} ({error}).") from error
    if repo_id.count("/") != 1:
        raise UserError(f"REPO must be a hub id such as owner/name, got {repo_id!r}. Add the owner.")


def upload_files(
    files: Mapping[str, Path | bytes], repo_id: str, *, dataset: bool, public: bool, tag: str = ""
) -> str:
    """Upload files in one commit, create the repository where it is missing, and return its URL.

    Files that the repository already holds are not uploaded again, so an interrupted upload is resumed by
    calling this again.

    Args:
        files: path in the repository -> local file or content.
        repo_id: hub id.
        dataset: whether it is a dataset; else it is a model.
        public: whether everyone may read it; otherwise a public repository is rejected.
        tag: git tag of the new state; empty: none.

    Raises:
        UserError: the hub cannot be reached or rejects the upload, or the repository is public without
            `public`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RevisionNotFoundError

    api, repo_type = HfApi(), "dataset" if dataset else "model"
    try:
        address = api.create_repo(repo_id, private=not public, repo_type=repo_type, exist_ok=True)
        if not public and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise UserError(
                f"{repo_id} must be private, got a public repository. Give --public to upload to it, or "
                "another name."
            )
        operations = [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in sorted(files.items())
        ]
        message = "Upload with latentact push"
        api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type)
        if tag:
            with suppress(RevisionNotFoundError):
                api.delete_tag(repo_id, tag=tag, repo_type=repo_type)
            api.create_tag(repo_id, tag=tag, repo_type=repo_type)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{repo_id} cannot be uploaded to ({first}). Log in with `hf auth login`, check the owner and "
            "the connection, and re-run the command."
        ) from error
    return str(address)


def resolve_folder(where: str | Path, needed: str = "config.json") -> Path:
    """Return the local folder of a checkpoint; download a hub id into the hub cache.

    Args:
        where: path or hub id.
        needed: file that the folder must contain.

    Raises:
        UserError: the folder does not exist or is not a checkpoint; pickles are rejected without reading.
    """
    path = resolve_path(where)
    if path.is_file():
        raise UserError(
            f"{path} must be a folder with config.json and {WEIGHTS}, got a file (pickles are never loaded)."
        )
    if not (path / needed).is_file():
        raise UserError(f"{path} must contain {needed}; give the folder of a finished run.")
    return path


def resolve_path(
    where: str | Path, patterns: tuple[str, ...] = ("*.json", "*.safetensors", "*.jinja")
) -> Path:
    """Return an existing local path unchanged; download a hub id and return its folder in the hub cache.

    Args:
        where: path or hub id.
        patterns: files of the hub repository to download.

    Raises:
        UserError: neither a path nor a repository of this name exists.
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
