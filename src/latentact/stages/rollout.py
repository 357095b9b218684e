"""Run a grounded policy in an environment: `latentact rollout --policy DIR --env NAME --out DIR`."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentact.device import require_device
from latentact.envs.distract import Distraction
from latentact.envs.spec import env_spec
from latentact.errors import UserError
from latentact.evaluation.rollout import rollout, save_rollout
from latentact.io.atomic import read_json
from latentact.policies.actor import PolicyActor
from latentact.policies.policy import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Run a policy for many episodes and keep success, return and videos."""

    policy: str
    """Folder or hub id of a policy that ends in robot actions."""
    env: str
    """Environment: `babyai/<Level>`, `pusht`, or a Gymnasium id."""
    out: str
    """Folder for `rollout.json` and the videos."""
    episodes: int = 100
    """Episodes; episode i starts from reset seed `seed + i`."""
    seed: int = 100_000
    """Reset seed of the first episode."""
    view: str = "agent"
    """"agent" or "full", as the policy's data was collected."""
    distract: str = ""
    """Distractors in the frames, as for `collect`."""
    max_steps: int = 0
    """Steps after which an episode ends; 0: the environment's own limit."""
    record: int = 3
    """Episodes whose video is kept."""
    device: str = "cpu"
    """cpu, cuda or mps."""


def run(config: RolloutConfig) -> dict[str, Any]:
    """Roll a policy out and return what `rollout.json` holds; a finished rollout is returned as it is."""
    out, distraction = Path(config.out), Distraction.parse(config.distract)
    asked = asdict(config)
    if (out / "rollout.json").exists():
        found = read_json(out / "rollout.json")
        if found.get("config") != asked:
            raise UserError(f"{out} holds another rollout; give another --out, or delete the folder.")
        return found
    require_device(config.device)
    policy = Policy.from_pretrained(config.policy, config.device)
    spec = env_spec(config.env, view=config.view)
    if policy.spec.action_space is None:
        raise UserError(f"{config.policy} predicts latent actions; ground it first: latentact ground --help.")
    if policy.spec.action_space != spec.action_space:
        raise UserError(
            f"{config.policy} acts by {_describe(policy.spec.action_space)} and {config.env} takes "
            f"{_describe(spec.action_space)}; give the environment it was grounded for."
        )
    if policy.spec.camera and policy.spec.camera != spec.camera:
        raise UserError(
            f"{config.policy} was trained on {policy.spec.camera} and {config.env} shows {spec.camera}; "
            f"give another --view."
        )
    actor = PolicyActor(policy, config.device)
    result = rollout(
        actor,
        config.env,
        episodes=config.episodes,
        seed=config.seed,
        view=config.view,
        distract=distraction,
        max_steps=config.max_steps,
        record=config.record,
    )
    save_rollout(result, out, config=asked)
    written = read_json(out / "rollout.json")
    log.info("%s: success %s, return %.3g", config.env, written["success"], written["return"])
    return written


def _describe(space: Any) -> str:
    return f"{space.size} {'classes' if space.discrete else 'numbers'}"
