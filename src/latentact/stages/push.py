"""Upload a LAM, policy, VLA or dataset with its card to the hub: `latentact push FOLDER REPO`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from latentact.errors import UserError
from latentact.io.atomic import read_object
from latentact.io.hub import check_repo_id, upload_files
from latentact.io.tensors import WEIGHTS, load_tensors
from latentact.policies.contract import Policy
from latentact.policies.vla.model import BACKBONE
from latentact.reporting.card import CardInfo, dataset_card, lam_card, policy_card

log = logging.getLogger(__name__)

DATASET_FOLDERS = ("meta", "data", "videos", "images")
"""Folders of a LeRobot dataset."""


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload a LAM, policy or dataset to the Hugging Face hub, with a card generated from its JSON files."""

    folder: str
    """Folder of a LAM, of a policy that outputs robot actions, of a vision-language-action model, or of a
    LeRobot dataset."""
    repo: str
    """Hub id, OWNER/NAME."""
    results: tuple[str, ...] = ()
    """Folders of `rollout` runs of the policy, whose results the card shows."""
    dataset: tuple[str, ...] = ()
    """Hub ids of the training data."""
    license: str = ""
    """License id such as apache-2.0; empty: not stated."""
    public: bool = False
    """Whether everyone may read the repository."""
    dry_run: bool = False
    """Whether to show the card and the files without uploading."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Files of an upload."""

    files: dict[str, Path | bytes]
    """Path in the repository -> local file or content."""
    card: str
    """Content of README.md."""
    address: str = ""
    """URL of the repository; empty: not uploaded."""

    def to_json(self) -> dict[str, Any]:
        """Return the names of the files, the card and the URL."""
        return {"files": sorted(self.files), "card": self.card, "address": self.address}


def run(config: PushConfig) -> Upload:
    """Upload a folder and return the files; a dry run uploads nothing.

    Raises:
        UserError: the folder is of none of these kinds, results belong to another policy, or the hub rejects
            the upload.
    """
    check_repo_id(config.repo)
    folder = Path(config.folder)
    info = CardInfo(repo_id=config.repo, license=config.license, datasets=config.dataset)
    dataset = (folder / "meta" / "info.json").is_file()
    if config.results and (dataset or not _is_policy(folder)):
        raise UserError(
            f"{config.folder} must be a policy to have --results, got another folder. Leave them out."
        )
    tag = ""
    if dataset:
        files, card = _dataset(folder, info)
        tag = str(read_object(folder / "meta" / "info.json")["codebase_version"])
    elif _is_policy(folder):
        files = _vla_files(folder) if (folder / BACKBONE).is_dir() else _policy_files(folder)
        files, card = _policy(folder, info, files, config.results)
    else:
        files, card = _lam(folder, info)
    files["README.md"] = card.encode()
    address = ""
    if not config.dry_run:
        address = upload_files(files, config.repo, dataset=dataset, public=config.public, tag=tag)
        log.info("%d files uploaded to %s", len(files), address)
    return Upload(files=files, card=card, address=address)


def _is_policy(folder: Path) -> bool:
    """Return whether a folder is one of our policies or VLAs; raise a UserError if it is not a checkpoint."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"FOLDER must hold config.json (a LAM or policy) or meta/info.json (a dataset), got {folder}. "
            "Give the folder of a finished run."
        )
    found = read_object(folder / "config.json").keys()
    return {"policy", "spec", "decoder"} <= found or {"vla", "spec", "head"} <= found


def _policy_files(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of a policy, rewritten in the current format."""
    policy = Policy.from_pretrained(folder)
    if policy.spec.action_space is None:
        raise UserError(
            f"{folder} must output robot actions, got a policy of latent actions. Ground it first: latentact "
            "ground --help."
        )
    with TemporaryDirectory() as written:
        policy.write(Path(written))
        return {path.name: path.read_bytes() for path in Path(written).iterdir()}


def _vla_files(folder: Path) -> dict[str, Path | bytes]:
    """Return the unchanged files of a vision-language-action model, without local paths."""
    config = read_object(folder / "config.json")
    base = Path(str(config["vla"]["vlm"]))
    if base.is_absolute() or base.exists():
        config["vla"]["vlm"] = base.name
    config["pretrained_path"] = None
    own = [folder / WEIGHTS, folder / "spec.json", *folder.glob("policy_p*processor*")]
    files: dict[str, Path | bytes] = {path.name: path for path in own}
    files |= {f"{BACKBONE}/{path.name}": path for path in (folder / BACKBONE).iterdir()}
    for path in files.values():
        if isinstance(path, Path) and path.suffix == ".safetensors":
            load_tensors(path, names=())
    return files | {"config.json": _encoded(config)}


def _policy(
    folder: Path, info: CardInfo, files: dict[str, Path | bytes], results: tuple[str, ...]
) -> tuple[dict[str, Path | bytes], str]:
    """Return files and card of a policy or VLA, with the results next to it."""
    found = {}
    for name in ("policy.json", "ground.json", "vla.json", "finetune_vla.json"):
        places = [folder, folder.resolve().parent] if folder.name == "finetuned" else [folder]
        path = next((place / name for place in places if (place / name).is_file()), None)
        if path is not None:
            found[name], files[name] = read_object(path), path
    rollouts = [_rollout(Path(result), folder) for result in results]
    for number, rollout in enumerate(rollouts):
        files[f"rollout_{number}.json"] = _encoded(rollout)
    comparison, own = _comparison(folder.resolve())
    if comparison is not None:
        files["comparison.json"] = _encoded(comparison)
    config = files["config.json"]
    assert isinstance(config, bytes)
    card = policy_card(
        info,
        json.loads(config),
        numbers=found,
        rollouts=rollouts,
        comparison=comparison,
        run=own,
    )
    return files, card


def _rollout(result: Path, folder: Path) -> dict[str, Any]:
    """Return a `rollout.json` of the policy, without paths in its settings."""
    path = result / "rollout.json" if result.is_dir() else result
    content = read_object(path)
    rolled_out = content.pop("config", {}).get("policy", "")
    if not rolled_out or Path(rolled_out).resolve() != folder.resolve():
        raise UserError(
            f"{path} must be a rollout of {folder}, got one of {rolled_out or 'an unknown policy'}. Give the "
            "folder of `latentact rollout --policy` with this policy."
        )
    return content


def _comparison(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the comparison with a policy, and the policy's rollout in its rows.

    A row's policy is next to its rollout: the last one trained there, after fine-tuning if any.
    """
    for root in folder.parents:
        if not (root / "comparison.json").is_file():
            continue
        content = read_object(root / "comparison.json")
        for row in content["rows"]:
            method = (root / row["run"]).parent
            names = ("finetuned", "grounded/finetuned", "grounded", "policy")
            final = [method / name for name in names]
            if folder == next((path for path in final if (path / "config.json").is_file()), None):
                return content, row["run"]
    return None, ""


def _lam(folder: Path, info: CardInfo) -> tuple[dict[str, Path | bytes], str]:
    names = ("config.json", "spec.json", WEIGHTS)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or "lam" not in read_object(folder / "config.json"):
        raise UserError(
            f"{folder} must be a LAM, a policy or a dataset of latentact, got a folder "
            f"{'without ' + ', '.join(missing) if missing else 'of another program'}. Give the folder of a "
            "finished run."
        )
    load_tensors(folder / WEIGHTS)
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    evaluation = None
    if (folder / "lam.json").is_file():
        evaluation = read_object(folder / "lam.json")
        files["lam.json"] = folder / "lam.json"
    return files, lam_card(info, read_object(folder / "spec.json"), evaluation)


def _dataset(folder: Path, info: CardInfo) -> tuple[dict[str, Path | bytes], str]:
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for name in DATASET_FOLDERS
        for path in sorted((folder / name).rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    meta = {
        name: read_object(path) if (path := folder / "meta" / name).is_file() else None
        for name in ("info.json", "collect.json", "lam_tokens.json")
    }
    card = dataset_card(
        info, meta["info.json"] or {}, collected=meta["collect.json"], tokens=meta["lam_tokens.json"]
    )
    return files, card


def _encoded(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
