"""Check whether a policy follows its guide: `latentact check-guidance --policy-path P --lam-model-path L`.

From the start states of new expert demonstrations, the policy is rolled out with the demonstration's video as
its guide, with another demonstration's, and without a guide. A policy that follows its guide stays near the
demonstration only in the first case. With `operations`, guides are edited as well, and rollouts are checked
for the effect of each edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from latentact.agents.agent import Agent
from latentact.agents.load import load_agent
from latentact.config import Count, Limit, OneOf, Seed
from latentact.device import require_device
from latentact.envs.checks import check_ranges
from latentact.envs.episode import Actor, EpisodeEnd, ExpertActor, run_episodes, to_observation
from latentact.envs.spec import ENVS, EnvSpec, env_spec, make_env, make_expert
from latentact.errors import UserError
from latentact.evaluation.policy.guidance import CONDITIONS, EpisodeTrace, compare_traces, summarize
from latentact.evaluation.policy.guide_operations import Rollouts, evaluate, measure
from latentact.guidance.extractor import LatentActionExtractor
from latentact.guidance.inference import Guide, LatentGuidedInference
from latentact.io.atomic import write_json
from latentact.progress import Progress
from latentact.reporting.pages.guidance import write_page

MAX_STEPS = 1000
"""Steps after which an expert's attempt fails."""


@dataclass(frozen=True, kw_only=True)
class CheckGuidanceConfig:
    """Roll a guided policy out with the matching guide, a wrong one and none."""

    policy: str
    """Folder or hub id of a policy that is conditioned on latent actions."""
    lam: str
    """Folder or hub id of the LAM that extracts the guides from the demonstrations."""
    out: str
    """Output folder for `guidance.json`, and with --operations for `guidance.html`."""
    env: Annotated[str, OneOf(ENVS)] = "pusht"
    """Environment with an expert and a state whose first two dimensions are the agent's position."""
    demos: Count = 30
    """Number of demonstrations."""
    seed: Seed = 500_000
    """Reset seed of the first demonstration; training data starts at 0 by default."""
    extra_steps: Limit = 0
    """Steps beyond the demonstration's length, in which the policy acts without a guide."""
    operations: bool = False
    """Whether rollouts of edited guides are checked as well: blend, interpolate, concat, replace, scale."""
    device: str = "cpu"
    """cpu, cuda or mps."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_ranges(demos=self.demos, seed=self.seed, extra_steps=self.extra_steps)


def run(config: CheckGuidanceConfig) -> dict[str, Any]:
    """Roll out, write `guidance.json` and return its content.

    Raises:
        UserError: policy, LAM and environment do not match, or the expert fails too often.
    """
    require_device(config.device)
    spec = env_spec(config.env)
    if len(spec.state_names) < 2:
        raise UserError(
            f"{config.env} must have the agent's position in its state, got a state of "
            f"{len(spec.state_names)} dimensions. Choose an environment such as pusht."
        )
    agent = load_agent(config.policy, config.device, guided=True)
    extractor = LatentActionExtractor(config.lam, device=config.device)
    extractor.resolution = extractor.model.spec.resolution  # as in labeling
    _check_one_step(config, spec, agent, extractor)
    demos: list[tuple[int, EpisodeTrace]] = []
    guides: list[Guide] = []
    with Progress("demonstrating", config.demos, "demonstrations") as progress:
        for seed, demo in _demonstrations(config):
            demos.append((seed, demo))
            guides.append(extractor.extract_from_frames(demo.pixels, float(spec.fps)))
            progress.advance(1)
    env, rows = make_env(config.env), []
    without_guide = agent.spec.latent is not None and agent.spec.latent.optional
    with Progress("following", config.demos, "demonstrations") as progress:
        for number, (seed, demo) in enumerate(demos):
            steps = len(demo.agent) - 1 + config.extra_steps
            row: dict[str, Any] = {"seed": seed, "steps": steps}
            for condition in CONDITIONS if without_guide else CONDITIONS[:2]:
                guide = guides[number if condition != "wrong" else (number + 1) % len(guides)]
                inference = LatentGuidedInference(
                    agent, guide, fps=float(spec.fps), extra_steps=config.extra_steps
                )
                actor = agent if condition == "none" else _LastActionHold(inference)
                row[condition] = compare_traces(demo, _trace(env, spec, seed, actor, steps)[0])
            rows.append(row)
            progress.advance(1)
    result = {"config": asdict(config), **summarize(rows), "rows": rows}
    if config.operations:
        edited = [measure(rollouts) for rollouts in _edited(env, spec, agent, demos, guides)]
        result |= {"operations": evaluate(edited), "edited": edited}
    env.close()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.out) / "guidance.json", result)
    if config.operations:
        write_page(Path(config.out) / "guidance.html", result)
    return result


def _edited(
    env: Any, spec: EnvSpec, agent: Agent, demos: Sequence[tuple[int, EpisodeTrace]], guides: Sequence[Guide]
) -> Iterator[Rollouts]:
    """Yield rollouts of edited guides for each demonstration and the next, from the first's start state."""
    latent = agent.spec.latent
    assert latent is not None
    horizon, transition = max(latent.offsets) + latent.stride - 1, max(1, round(spec.fps))
    with Progress("following edited guides", len(demos), "demonstrations") as progress:
        for number, (seed, _) in enumerate(demos):
            following = (number + 1) % len(guides)
            a, b = guides[number], guides[following]
            half, first = max(1, len(a) // 2), len(a) // 3
            segment = range(first, first + max(1, min(len(a) // 6, len(b) // 2)))
            middle = len(b) // 3
            edits = {
                "a": a,
                "b": b,
                "blend": Guide.blend([a, b], [0.5, 0.5]),
                "start": a.interpolate(b, 0.0),
                "end": a.interpolate(b, 1.0),
                "concat": a.slice(0, half).concat(b, transition),
                "replace": a.replace(segment, b.slice(middle, middle + len(segment))),
                "scale": a.scale(0.0),
            }
            yield Rollouts(
                paths={name: _path(env, spec, seed, agent, guide) for name, guide in edits.items()},
                second=demos[following][1].agent,
                first_end=half,
                second_start=half + transition,
                segment=segment,
                horizon=horizon,
            )
            progress.advance(1)


def _path(env: Any, spec: EnvSpec, seed: int, agent: Agent, guide: Guide) -> np.ndarray:
    """Return the agent's path while it follows a guide to its end; a policy's noise depends on the seed."""
    torch.manual_seed(seed)
    inference = LatentGuidedInference(agent, guide, fps=float(spec.fps))
    return _trace(env, spec, seed, inference, len(inference))[0].agent


def _check_one_step(
    config: CheckGuidanceConfig, spec: EnvSpec, agent: Agent, extractor: LatentActionExtractor
) -> None:
    """Predict one action with a guide of still frames, so that mismatches fail at once."""
    agent.spec.check_env(spec, config.policy)
    lam = extractor.model
    if config.operations and lam.spec.codebook_size is not None and lam.codebook() is None:
        raise UserError(f"--operations needs the codebook of {lam.spec.model}, got none. Leave it out.")
    env = make_env(config.env)
    observation, info = env.reset(seed=config.seed)
    make_expert(config.env, env, config.seed)
    fps = float(spec.fps)
    still = np.repeat(observation["pixels"][None], extractor.gap(fps) + 1, axis=0)
    guide = extractor.extract_from_frames(still, fps)
    inference = LatentGuidedInference(agent, guide, fps=fps, extra_steps=config.extra_steps)
    inference.act(to_observation([observation], [info["task"]], spec.camera))
    env.close()


def _demonstrations(config: CheckGuidanceConfig) -> Iterator[tuple[int, EpisodeTrace]]:
    """Yield seeds and the trajectories of successful expert episodes."""
    spec, env, found = env_spec(config.env), make_env(config.env), 0
    attempts = 20 * config.demos + 100
    for seed in range(config.seed, config.seed + attempts):
        trace, end = _trace(env, spec, seed, ExpertActor(config.env, [env], [seed]), MAX_STEPS)
        if end is not EpisodeEnd.ACTOR and trace.success:
            yield seed, trace
            found += 1
            if found == config.demos:
                env.close()
                return
    raise UserError(
        f"the expert of {config.env} must succeed in {config.demos} of {attempts} episodes, got {found} "
        "successes. Choose another environment, or lower --demos."
    )


class _LastActionHold:
    """Follow a guide, and repeat the last action after its end."""

    def __init__(self, inference: LatentGuidedInference) -> None:
        self._inference = inference

    def reset(self, num_envs: int) -> None:
        self._inference.reset(num_envs)
        self._last: list[Any] = []

    def act(self, observation: dict[str, Any]) -> list[Any]:
        actions = self._inference.act(observation)
        self._last = actions if actions[0] is not None else self._last
        return self._last


def _trace(
    env: Any, spec: EnvSpec, seed: int, actor: Actor, steps: int
) -> tuple[EpisodeTrace, EpisodeEnd | None]:
    """Run one episode of at most `steps` steps."""
    frames: list[np.ndarray] = []
    (episode,) = run_episodes(
        actor,
        [env],
        [seed],
        camera=spec.camera,
        max_steps=steps,
        frames=[frames],
        record=("states", "infos"),
    )
    if episode.error is not None:
        raise episode.error
    return EpisodeTrace.from_episode(episode, frames), episode.end
