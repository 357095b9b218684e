"""Roll a policy out in an environment: `latentact rollout --policy DIR --env NAME --out DIR`."""

from __future__ import annotations

import logging
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from latentact.agents.agent import Agent
from latentact.agents.load import load_agent
from latentact.config import Between, Count, Limit, OneOf, Seed, check_bounds
from latentact.device import require_device
from latentact.envs.checks import check_ranges, check_step_limit
from latentact.envs.distract import Distraction
from latentact.envs.spec import ENVS, VIEWS, env_spec, make_env, make_expert
from latentact.errors import UserError, require_between, require_one_of
from latentact.evaluation.policy.rollout import (
    PARTIAL,
    RolloutStoppedError,
    conditions,
    rollout,
    save_rollout,
)
from latentact.io.atomic import read_object
from latentact.policies.selection import SELECTIONS, Selection, Temperature, selector

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Run a policy for many episodes and record success, return and videos."""

    policy: str
    """Folder or hub id of a policy that predicts robot actions: ours, or any LeRobot policy."""
    env: Annotated[str, OneOf(ENVS)]
    """Environment: `babyai/<Level>`, `metaworld/<task>`, `pusht`, or a Gymnasium id, also `PACKAGE:ID` and
    `PACKAGE/NAME`."""
    out: str
    """Output folder for `rollout.json` and the videos; if the environment fails, `partial.json` has the
    episodes before that."""
    episodes: Count = 100
    """Number of episodes; episode i starts from reset seed `seed + i`."""
    seed: Seed = 100_000
    """Reset seed of the first episode."""
    view: Annotated[str, OneOf(VIEWS)] = "agent"
    """"agent" or "full"; the view in which the policy's data was collected."""
    distract: str = ""
    """Distractors in the frames and random colors, as for `collect`."""
    max_steps: Limit = 0
    """Steps after which an episode ends; 0: the environment's own limit. Required for an environment without
    one (`max_episode_steps` None)."""
    latency: Annotated[int, Between(0, 1000)] = 0
    """Steps by which every action arrives late. Until the first one arrives, the environment's no-op is
    executed; in environments without a no-op, the first action is."""
    action_noise: Annotated[float, Between(0, 10)] = 0.0
    """Standard deviation of noise on continuous actions, relative to half the range of each dimension."""
    record: Limit = 3
    """Number of episodes whose video is written."""
    action_selection: Selection = "greedy"
    """Discrete actions of our policies: greedy takes the most likely one, sample draws from the predicted
    distribution."""
    temperature: Temperature = 1.0
    """sample: temperature of the softmax; below 1, likely actions are drawn more often."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    smoke_test: bool = False
    """Whether to run only two episodes of at most 20 steps, as a check."""
    overwrite: bool = False
    """Whether to replace a finished rollout."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("--action-selection", self.action_selection, SELECTIONS)
        require_between("--temperature", self.temperature, 1e-3, 1e3)
        check_bounds(self)
        check_ranges(episodes=self.episodes, seed=self.seed, max_steps=self.max_steps, record=self.record)


def run(config: RolloutConfig, agent: Agent | None = None) -> dict[str, Any]:
    """Roll a policy out and return the content of `rollout.json`; a finished rollout is not repeated.

    Args:
        config: settings.
        agent: agent that replaces the policy of `config`, which is then only its name.

    Raises:
        UserError: the policy cannot act in the environment, or the environment failed.
    """
    out, distraction = Path(config.out), Distraction.parse(config.distract)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, got the file {out}. Choose another.")
    settings = {key: value for key, value in asdict(config).items() if key != "overwrite"}
    if config.smoke_test:
        config = replace(config, episodes=2, max_steps=20)
    if not config.overwrite and (out / "rollout.json").exists():
        found = read_object(out / "rollout.json")
        if _with_defaults(found.get("config")) != {**settings, "overwrite": False}:
            raise UserError(
                f"{out} must be empty or hold this rollout, got one with other settings. Choose another "
                "--out, or delete the folder."
            )
        return found
    require_device(config.device)
    choose = selector(config.action_selection, config.temperature)
    agent = agent or load_agent(config.policy, config.device, choose=choose)
    spec = env_spec(config.env, view=config.view)
    check_step_limit(spec, config.max_steps)
    agent.spec.check_env(spec, config.policy)
    torch.manual_seed(config.seed)  # diffusion policies and action_selection=sample draw random numbers
    try:
        result = rollout(
            agent,
            config.env,
            frames=bool(agent.spec.cameras),
            episodes=config.episodes,
            seed=config.seed,
            view=config.view,
            distract=distraction,
            max_steps=config.max_steps,
            record=config.record,
            latency=config.latency,
            action_noise=config.action_noise,
        )
    except RolloutStoppedError as error:
        if error.finished is None:
            raise
        save_rollout(error.finished, out, name=PARTIAL, config=settings, error=str(error))
        count = len(error.finished.returns)
        raise UserError(f"{error} The episodes before it ({count}) are in {out / PARTIAL}.") from error
    save_rollout(result, out, config=settings)
    written = read_object(out / "rollout.json")
    log.info("%s: %s", config.env, summary(written))
    return written


def evaluate(config: Any, policy: Path, out: Path, agent: Agent | None = None, **more: Any) -> dict[str, Any]:
    """Roll a policy out on the evaluation episodes of a stage and return the content of `rollout.json`.

    Args:
        config: settings of the stage: `env`, `view`, `max_steps`, `episodes`, `eval_seed` and
            `action_selection`.
        policy: folder of the policy.
        out: folder of the rollout.
        agent: see `run`.
        more: further settings of the rollout.
    """
    settings = RolloutConfig(
        policy=str(policy),
        env=config.env,
        out=str(out),
        episodes=config.episodes,
        seed=config.eval_seed,
        view=config.view,
        max_steps=config.max_steps,
        action_selection=config.action_selection,
        **more,
    )
    return run(settings, agent)


def evaluate_expert(config: Any, out: Path) -> dict[str, Any] | None:
    """Roll the environment's expert out on the same episodes; return None if the environment has no expert.

    Args:
        config: settings of the stage, as in `evaluate`.
        out: folder of the rollout; a finished one is not repeated.

    Raises:
        EnvError: the environment failed.
    """
    if not (out / "rollout.json").exists():
        env = make_env(config.env, view=config.view)
        env.reset(seed=config.eval_seed)
        try:
            make_expert(config.env, env, config.eval_seed)
        except UserError:  # it has none; a failure of the rollout is an error
            return None
        finally:
            env.close()
        result = rollout(
            None,
            config.env,
            episodes=config.episodes,
            seed=config.eval_seed,
            view=config.view,
            max_steps=config.max_steps,
        )
        save_rollout(result, out)
    return read_object(out / "rollout.json")


def _with_defaults(settings: Any) -> Any:
    """Return the settings of a rollout; settings missing from earlier releases have their defaults."""
    if not isinstance(settings, dict):
        return settings
    return {f.name: f.default for f in fields(RolloutConfig) if f.default is not MISSING} | settings


def summary(result: dict[str, Any]) -> str:
    """Return the success, if the environment reports one, and the return of a `rollout.json` as one line."""
    mean, changed = f"return {result['return']:.3g}", conditions(result)
    end = f" with {changed}" if changed else ""
    if result["success"] is None:
        low, high = result["return_ci95"]
        return f"{mean} ({low:.3g} to {high:.3g}){end}"
    low, high = result["ci95"]
    return f"success {result['success']:.3g} ({low:.3g} to {high:.3g}), {mean}{end}"
