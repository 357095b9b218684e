"""Where a LeRobot dataset lies: a folder, lerobot's own place, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentact.errors import UserError, missing_extra


def local_dataset(repo_id: str, root: str) -> Path:
    """Return the folder of a dataset, downloaded from the Hugging Face hub where it is not here yet.

    Args:
        repo_id: hub id; empty: `root` says it all.
        root: folder; empty: where lerobot keeps datasets ($HF_LEROBOT_HOME) and downloads.

    Raises:
        UserError: it is not here and cannot be downloaded.
    """
    if root and (Path(root).exists() or not repo_id):
        return Path(root)
    try:
        from lerobot.utils.constants import HF_LEROBOT_HOME, HF_LEROBOT_HUB_CACHE
    except ModuleNotFoundError as error:
        raise missing_extra("lerobot", "lerobot") from error
    if not root and (HF_LEROBOT_HOME / repo_id / "meta/info.json").is_file():
        return HF_LEROBOT_HOME / repo_id
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoSuchRevision

    where: dict[str, Any] = {"local_dir": root} if root else {"cache_dir": HF_LEROBOT_HUB_CACHE}
    try:
        try:
            folder = huggingface_hub.snapshot_download(repo_id, repo_type="dataset", revision="v3.0", **where)
        except NoSuchRevision:  # an older dataset
            folder = huggingface_hub.snapshot_download(repo_id, repo_type="dataset", **where)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{repo_id} is not in {HF_LEROBOT_HOME} and cannot be downloaded ({reason}); check the name and "
            f"the connection, or give --dataset-root."
        ) from error
    return Path(folder)
