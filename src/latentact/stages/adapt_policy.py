"""Fit a LeRobot policy that was pretrained on latent actions to a robot: `latentact adapt-policy`.

Example: `latentact adapt-policy --policy runs/act --data data/labeled --out runs/act_robot`. Then
`lerobot-train --policy.path=runs/act_robot` fine-tunes it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from latentact.agents.load import pretrained_folder
from latentact.config import LARGEST, Between
from latentact.data.lerobot.source import lerobot_version
from latentact.data.lerobot.writer import require_lerobot
from latentact.data.locate import resolve_dataset
from latentact.errors import UserError
from latentact.io.atomic import atomic_dir, read_object, write_json
from latentact.policies.lerobot_files import TYPE, VLA_TYPE
from latentact.stages.precompute import clear_drafts
from latentact.training.lerobot.adapt import adapt

log = logging.getLogger(__name__)

SIDECAR = "adapted.json"


@dataclass(frozen=True, kw_only=True)
class AdaptPolicyConfig:
    """Fit a pretrained LeRobot policy to the actions, state and statistics of another dataset."""

    policy: str
    """Folder or hub id of a LeRobot policy, or the output folder of its training."""
    data: str
    """LeRobot v3 dataset with robot actions for fine-tuning."""
    out: str
    """Folder to write, for `lerobot-train --policy.path`."""
    seed: Annotated[int, Between(0, LARGEST)] = 0
    """Seed of the new tensors."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """Result of `adapt-policy`."""

    path: Path
    """Folder of the policy."""
    numbers: dict[str, Any]
    """Content of `adapted.json`."""

    def to_json(self) -> dict[str, Any]:
        """Return the folder and the changes."""
        return {"path": str(self.path), **self.numbers}


def run(config: AdaptPolicyConfig) -> Adapted:
    """Write the adapted policy."""
    out = Path(config.out)
    asked = {"policy": config.policy, "data": config.data, "seed": config.seed}
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        done = read_object(out / SIDECAR) if (out / SIDECAR).is_file() else {}
        if done.get("asked") != asked:
            raise UserError(
                f"{out} must be empty or hold this policy, got other files or settings. Choose another --out."
            )
        log.info("%s is already finished", out)
        return Adapted(path=out, numbers=done)
    require_lerobot()
    policy, data = pretrained_folder(config.policy), resolve_dataset(config.data)
    kind = read_object(policy / "config.json").get("type", TYPE)
    if kind in (TYPE, VLA_TYPE):
        raise UserError(
            f"{config.policy} must be a LeRobot policy, got one of latentact. Use latentact "
            f"{'ground' if kind == TYPE else 'finetune-vla'}."
        )
    if not data.exists():
        raise UserError(f"{config.data} must be a LeRobot v3 dataset, got no such folder. Give its path.")
    if not lerobot_version(data).startswith("v3"):
        raise UserError(
            f"{config.data} must be a LeRobot v3 dataset, got another format. Convert it with LeRobot."
        )
    clear_drafts(out)
    with atomic_dir(out) as folder:
        numbers = {"asked": asked, **adapt(policy, data, folder, config.seed)}
        write_json(folder / SIDECAR, numbers)
    return Adapted(path=out, numbers=numbers)
