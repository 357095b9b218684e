"""Does a guide really guide? `latentact check-guidance --policy-path DIR --lam-model-path DIR`.

From the start of expert demonstrations that no training has seen, the policy is rolled out with the
demonstration's own video as its guide, with another one's, and with none. A policy that follows its guide
comes near the demonstration in the first case only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentact.agents.agent import GuidedPolicy
from latentact.agents.load import load_guided_policy
from latentact.device import require_device
from latentact.envs.checks import check_compatible, check_ranges
from latentact.envs.spec import EnvSpec, ExpertStuckError, env_spec, make_env, make_expert
from latentact.errors import UserError
from latentact.evaluation.policy.rollout import mean_interval
from latentact.guidance.extractor import LatentActionExtractor
from latentact.guidance.inference import Guide, LatentGuidedInference
from latentact.io.atomic import write_json
from latentact.progress import Progress

log = logging.getLogger(__name__)

MOST_STEPS = 1000
"""Steps after which an expert's attempt has failed."""
CONDITIONS = ("matching", "wrong", "none")


@dataclass(frozen=True, kw_only=True)
class CheckGuidanceConfig:
    """Roll a guided policy out with the matching guide, a wrong one and none."""

    policy: str
    """Folder or hub id of a policy that follows latent actions."""
    lam: str
    """Folder or hub id of the LAM that turns demonstrations into guides."""
    out: str
    """Folder for `guidance.json`."""
    env: str = "pusht"
    """Environment with an expert and a state whose first two numbers are the agent's place."""
    demos: int = 30
    """Demonstrations."""
    seed: int = 500_000
    """Reset seed of the first demonstration; training data begins at 0 unless it was told otherwise."""
    device: str = "cpu"
    """cpu, cuda or mps."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_ranges(demos=self.demos, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class EpisodeTrace:
    """What happened in one episode of t steps."""

    pixels: np.ndarray
    """uint8 ``[t + 1, h, w, 3]``."""
    agent: np.ndarray
    """Place of the agent ``[t + 1, 2]``."""
    block: np.ndarray | None
    """Place of the block ``[t, 2]``, where the environment tells (``info["block_pose"]``)."""
    coverage: np.ndarray | None
    """Share of the goal that is covered ``[t]``, where the environment tells (``info["coverage"]``)."""
    success: bool
    """Whether the task was done."""


def run(config: CheckGuidanceConfig) -> dict[str, Any]:
    """Measure, write `guidance.json` and return what it holds."""
    require_device(config.device)
    spec = env_spec(config.env)
    if len(spec.state_names) < 2:
        raise UserError(f"{config.env} tells no place of the agent; give one that does, such as pusht.")
    policy = load_guided_policy(config.policy, config.device)
    extractor = LatentActionExtractor(config.lam, device=config.device)
    extractor.resolution = extractor.model.spec.resolution  # as labels were made
    _refuse_unless_fits(config, spec, policy, extractor)
    demos, guides = [], []
    with Progress("demonstrating", config.demos, "demonstrations") as progress:
        for seed, demo in _demonstrations(config):
            guide = extractor.extract_from_frames(demo.pixels, float(spec.fps))
            demos.append((seed, demo))
            guides.append(guide)
            progress.advance(1)
    env, rows = make_env(config.env), []
    can_go_alone = policy.without_guide
    with Progress("following", config.demos, "demonstrations") as progress:
        for number, (seed, demo) in enumerate(demos):
            row: dict[str, Any] = {"seed": seed, "steps": len(demo.agent) - 1}
            for condition in CONDITIONS if can_go_alone else CONDITIONS[:2]:
                guide = guides[number if condition != "wrong" else (number + 1) % len(guides)]
                played = _follow(env, spec, seed, policy, guide, condition, len(demo.agent) - 1)
                row[condition] = _compare(demo, played)
            rows.append(row)
            progress.advance(1)
    env.close()
    result = {"config": asdict(config), **_summary(rows), "rows": rows}
    Path(config.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.out) / "guidance.json", result)
    return result


def _refuse_unless_fits(
    config: CheckGuidanceConfig, spec: EnvSpec, policy: GuidedPolicy, extractor: LatentActionExtractor
) -> None:
    """Take one action after a guide in which nothing moves, so that what does not fit fails at once."""
    check_compatible(
        spec,
        config.policy,
        actions=policy.actions,
        cameras=policy.cameras,
        state_size=policy.state_size,
    )
    env = make_env(config.env)
    observation, info = env.reset(seed=config.seed)
    make_expert(config.env, env, config.seed)
    fps = float(spec.fps)
    still = np.repeat(observation["pixels"][None], extractor.gap(fps) + 1, axis=0)
    inference = LatentGuidedInference(policy, extractor.extract_from_frames(still, fps), fps=fps)
    inference.predict_action(_named(spec, observation, info["task"]))
    env.close()


def _named(spec: EnvSpec, observation: dict[str, np.ndarray], task: str) -> dict[str, Any]:
    """Return an observation by the keys that policies know."""
    return {
        spec.camera: observation["pixels"],
        "observation.state": observation["agent_pos"],
        "task": task,
    }


def _demonstrations(config: CheckGuidanceConfig) -> Iterator[tuple[int, EpisodeTrace]]:
    """Yield seeds and what a successful expert did from them."""
    env, found, seed = make_env(config.env), 0, config.seed
    while found < config.demos:
        observation, _ = env.reset(seed=seed)
        expert = make_expert(config.env, env, seed)
        try:
            demo = _play(env, observation, lambda _, expert=expert: expert.act(), MOST_STEPS)
        except ExpertStuckError:
            demo = None
        if demo is not None and demo.success:
            yield seed, demo
            found += 1
        seed += 1
        if seed - config.seed > 20 * config.demos + 100:
            raise UserError(f"the expert of {config.env} fails too often; give another environment.")
    env.close()


def _follow(
    env: Any, spec: EnvSpec, seed: int, policy: GuidedPolicy, guide: Guide, condition: str, steps: int
) -> EpisodeTrace:
    """Roll the policy out from a demonstration's start, for as long as that lasted."""
    inference = LatentGuidedInference(policy, guide, fps=float(spec.fps))
    observation, info = env.reset(seed=seed)

    last: Any = None

    def act(seen: dict[str, np.ndarray]) -> Any:
        nonlocal last
        named = _named(spec, seen, info["task"])
        if condition == "none":
            return policy.act(policy.prepare(named, None))
        action = inference.predict_action(named)
        last = last if action is None else action  # a wrong guide may be shorter: its last action stays
        return last

    return _play(env, observation, act, steps)


def _play(env: Any, observation: dict[str, np.ndarray], act: Any, steps: int) -> EpisodeTrace:
    pixels, agent, infos = [observation["pixels"]], [observation["agent_pos"][:2]], []
    for _ in range(steps):
        observation, _, terminated, truncated, info = env.step(act(observation))
        pixels.append(observation["pixels"])
        agent.append(observation["agent_pos"][:2])
        infos.append(info)
        if terminated or truncated:
            break
    told = {
        key: np.array([info[key] for info in infos]) if infos and key in infos[0] else None
        for key in ("block_pose", "coverage")
    }
    block = told["block_pose"]
    return EpisodeTrace(
        pixels=np.stack(pixels),
        agent=np.stack(agent),
        block=None if block is None else block[:, :2],
        coverage=told["coverage"],
        success=any(info.get("is_success", False) for info in infos),
    )


def _compare(demo: EpisodeTrace, played: EpisodeTrace) -> dict[str, Any]:
    """Return mean distances to the demonstration at the same moments, in the environment's units."""
    moments = min(len(demo.agent), len(played.agent))
    row: dict[str, Any] = {
        "agent": float(np.linalg.norm(demo.agent[:moments] - played.agent[:moments], axis=1).mean()),
        "success": played.success,
    }
    if demo.block is not None and played.block is not None:
        moments = min(len(demo.block), len(played.block))
        row["block"] = float(np.linalg.norm(demo.block[:moments] - played.block[:moments], axis=1).mean())
    if played.coverage is not None:
        row |= {"coverage": float(played.coverage[-1]), "max_coverage": float(played.coverage.max())}
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means with 95 % intervals over demonstrations, and a verdict in plain words."""
    found: dict[str, Any] = {}
    for condition in (c for c in CONDITIONS if c in rows[0]):
        found[condition] = {
            name: {
                "mean": float(np.mean([row[condition][name] for row in rows])),
                "ci95": mean_interval([row[condition][name] for row in rows]),
            }
            for name in rows[0][condition]
        }
    own, other = found["matching"]["agent"], found["wrong"]["agent"]
    ratio = own["mean"] / max(other["mean"], 1e-9)
    said = (
        f"{own['mean']:.3g} from the demonstration's path with its own guide, "
        f"{other['mean']:.3g} with another's"
    )
    if own["ci95"][1] >= other["ci95"][0]:
        verdict = f"The policy ignores its guide: the agent is {said}, and the intervals overlap."
    elif ratio > 0.5:
        verdict = f"The guide steers the policy a little: the agent is {said}."
    else:
        verdict = f"The policy follows its guide: the agent is {said}."
    return {"conditions": found, "ratio": ratio, "verdict": verdict}
