"""Run a grounded policy in an environment: `latentact rollout --policy DIR --env NAME --out DIR`."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentact.agents.own import PolicyActor
from latentact.device import require_device
from latentact.envs.checks import check_compatible, check_ranges, check_step_limit
from latentact.envs.distract import Distraction
from latentact.envs.spec import env_spec
from latentact.errors import UserError
from latentact.evaluation.policy.rollout import PARTIAL, RolloutStoppedError, rollout, save_rollout
from latentact.io.atomic import read_object
from latentact.policies.contract import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Run a policy for many episodes and keep success, return and videos."""

    policy: str
    """Folder or hub id of a policy that ends in robot actions."""
    env: str
    """Environment: `babyai/<Level>`, `pusht`, or a Gymnasium id, also `PACKAGE:ID` and `PACKAGE/NAME`."""
    out: str
    """Folder for `rollout.json` and the videos; where the environment fails, the episodes before that are in
    `partial.json`."""
    episodes: int = 100
    """Episodes; episode i starts from reset seed `seed + i`."""
    seed: int = 100_000
    """Reset seed of the first episode."""
    view: str = "agent"
    """"agent" or "full", as the policy's data was collected."""
    distract: str = ""
    """Distractors in the frames, as for `collect`."""
    max_steps: int = 0
    """Steps after which an episode ends; 0: the environment's own limit. An environment that has none
    (`max_episode_steps` None) needs it."""
    record: int = 3
    """Episodes whose video is kept."""
    device: str = "cpu"
    """cpu, cuda or mps."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_ranges(episodes=self.episodes, seed=self.seed, max_steps=self.max_steps, record=self.record)


def run(config: RolloutConfig) -> dict[str, Any]:
    """Roll a policy out and return what `rollout.json` holds; a finished rollout is returned as it is.

    Raises:
        UserError: the policy cannot act there, or the environment failed.
    """
    out, distraction = Path(config.out), Distraction.parse(config.distract)
    asked = asdict(config)
    if (out / "rollout.json").exists():
        found = read_object(out / "rollout.json")
        if found.get("config") != asked:
            raise UserError(f"{out} holds another rollout; give another --out, or delete the folder.")
        return found
    require_device(config.device)
    policy = Policy.from_pretrained(config.policy, config.device)
    spec = env_spec(config.env, view=config.view)
    check_step_limit(spec, config.max_steps)
    if policy.spec.action_space is None:
        raise UserError(f"{config.policy} predicts latent actions; ground it first: latentact ground --help.")
    check_compatible(
        spec,
        config.policy,
        actions=policy.spec.action_space,
        cameras=(policy.spec.camera,),
        channels=policy.spec.channels,
        state_size=policy.spec.state_size if policy.uses_state else 0,
    )
    actor = PolicyActor(policy, config.device)
    try:
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
    except RolloutStoppedError as error:
        if error.finished is None:
            raise
        save_rollout(error.finished, out, name=PARTIAL, config=asked, error=str(error))
        count = len(error.finished.returns)
        raise UserError(f"{error} The episodes before it ({count}) are in {out / PARTIAL}.") from error
    save_rollout(result, out, config=asked)
    written = read_object(out / "rollout.json")
    log.info("%s: %s", config.env, summary(written))
    return written


def summary(result: dict[str, Any]) -> str:
    """Return the success, where the environment reports one, and the return of a `rollout.json` in words."""
    mean = f"return {result['return']:.3g}"
    if result["success"] is None:
        low, high = result["return_ci95"]
        return f"{mean} ({low:.3g} to {high:.3g})"
    low, high = result["ci95"]
    return f"success {result['success']:.3g} ({low:.3g} to {high:.3g}), {mean}"
