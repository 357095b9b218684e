"""Find datasets by name: a local folder, LeRobot's own folder, or the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from latentact.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
"""`owner/name` or `owner/name@revision`."""


def resolve_dataset(name: str | Path) -> Path:
    """Return the path of a dataset: a local path unchanged, or the local copy of a hub id.

    A local file or folder takes precedence over a hub id of the same name. `owner/name` is downloaded if
    there is no local folder `owner`.

    Raises:
        UserError: the dataset cannot be downloaded.
    """
    return download_dataset(str(name)) if _is_hub_id(str(name)) else Path(name).expanduser()


def absolute_name(name: str) -> str:
    """Return a dataset name that is valid in every working directory: a hub id or an absolute path."""
    return name if _is_hub_id(name) else str(Path(name).absolute())


def _is_hub_id(name: str) -> bool:
    path = Path(name)
    return bool(HUB_ID.fullmatch(name)) and not path.exists() and not path.parent.exists()


def local_dataset(repo_id: str, root: str) -> Path:
    """Return the folder of a dataset, downloaded from the Hugging Face hub if it is not local yet.

    Args:
        repo_id: hub id, `owner/name` or `owner/name@revision`; empty: `root` names the dataset.
        root: folder or hub id; empty: the folder where LeRobot keeps datasets ($HF_LEROBOT_HOME).

    Raises:
        UserError: the dataset cannot be downloaded.
    """
    if root and (Path(root).exists() or not repo_id):
        return resolve_dataset(root)
    return download_dataset(repo_id, root)


def download_dataset(repo_id: str, root: str = "") -> Path:
    """Return the folder of a hub dataset, downloaded unless LeRobot already has it.

    Args:
        repo_id: `owner/name`, or `owner/name@revision`. Without a revision the tag v3.0 is preferred.
        root: folder to download to; empty: LeRobot's cache.

    Raises:
        UserError: the dataset cannot be downloaded.
    """
    import huggingface_hub
    from huggingface_hub.constants import HF_HOME
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoSuchRevision

    # As in lerobot.utils.constants, which needs the extra `lerobot`.
    home = Path(os.environ.get("HF_LEROBOT_HOME") or Path(HF_HOME) / "lerobot").expanduser()
    repo_id, _, revision = repo_id.partition("@")
    if not root and not revision and (home / repo_id / "meta/info.json").is_file():
        return home / repo_id
    options: dict[str, Any] = {"local_dir": root} if root else {"cache_dir": home / "hub"}
    try:
        try:
            folder = huggingface_hub.snapshot_download(
                repo_id, repo_type="dataset", revision=revision or "v3.0", **options
            )
        except NoSuchRevision:
            if revision:
                raise
            folder = huggingface_hub.snapshot_download(repo_id, repo_type="dataset", **options)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        shown = f"{repo_id}@{revision}" if revision else repo_id
        raise UserError(
            f"{shown} must be a folder or a dataset of the hub, got neither ({reason}). Check the name and "
            "the connection, or give a folder."
        ) from error
    return Path(folder)
