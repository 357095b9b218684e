"""Learn a policy by acting in an environment: `latentact dagger env=NAME`, `latentact gail env=NAME`.

`latentact learn learner=NAME` runs any registered learner. `learner.json` holds a row per policy, with the
baselines that belong to the learner, and a verdict; `latentact report` makes a page of it.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from latentact.config import Count, Limit, OneOf, Pixels, Seed, choice
from latentact.data.cache import DataConfig, open_store
from latentact.data.mixture import TrainingDataConfig
from latentact.envs.checks import check_ranges, check_step_limit, try_step
from latentact.envs.distract import Distraction
from latentact.envs.spec import ENVS, VIEWS, env_spec
from latentact.errors import UserError, require_between, require_one_of
from latentact.io.atomic import read_object, write_json
from latentact.learners.contract import LEARNERS, LearnerTools, score
from latentact.policies.contract import POLICIES, Policy, PolicyConfig, uses_frames
from latentact.policies.selection import SELECTIONS, Selection, Temperature, selector
from latentact.stages import collect, finetune, rollout, train_policy
from latentact.training.cluster.contract import CLUSTERS, ClusterStage
from latentact.training.run_folder import begin_run, finished
from latentact.training.settings import TrainingConfig
from latentact.types import ActionSpace

log = logging.getLogger(__name__)

RESULT = "learner.json"
BLACK = 16
"""Height and width in pixels of the frames for policies that take none."""


@dataclass(frozen=True, kw_only=True)
class LearnConfig(ClusterStage):
    """Learn a policy by acting in an environment, and compare it with its baselines."""

    ONE_PROCESS: ClassVar = True

    out: str = "runs/learn"
    """Run folder; re-run the same command to resume."""
    learner: Any = choice(LEARNERS, "dagger")
    """How it learns."""
    env: Annotated[str, OneOf(ENVS)]
    """Environment: `babyai/<Level>`, `pusht`, or a Gymnasium id; dagger needs one with an expert."""
    data: str = ""
    """Demonstrations for gail, a LeRobot dataset; empty: those of the environment's expert."""
    policy: Any = choice(POLICIES, "bc")
    """The policy: bc, or latent with `start`. policy.network.backbone=state takes the robot state alone."""
    start: str = ""
    """Folder of a policy that outputs robot actions, such as a grounded latent policy: every training of the
    learner and of its baselines fine-tunes it; empty: from scratch."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=4000, batch_size=64, lr=3e-3, checkpoint_every=1000, eval_every=0, precision="32-true"
        )
    )
    """How every policy is trained."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of training and of the episodes that are learned from; every one repeats everything."""
    resolution: Pixels = 0
    """Height and width of the frames in pixels; 0: the environment's own."""
    view: Annotated[str, OneOf(VIEWS)] = "agent"
    """agent or full."""
    max_steps: Limit = 0
    """Steps after which an episode ends; 0: the environment's own limit."""
    episodes: Count = 50
    """Evaluation episodes per policy."""
    eval_seed: Seed = 100_000
    """Reset seed of the first evaluation episode."""
    record: Limit = 0
    """Evaluation episodes per policy whose video is kept."""
    action_selection: Selection = "greedy"
    """Discrete actions: greedy takes the most likely one, sample draws one by its probability."""
    temperature: Temperature = 1.0
    """sample: temperature of the softmax."""
    cluster: Any = choice(CLUSTERS, "local")
    """Where it runs; in one process."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("action_selection", self.action_selection, SELECTIONS)
        require_between("temperature", self.temperature, 1e-3, 1e3)
        require_one_of("view", self.view, VIEWS)
        check_ranges(
            episodes=self.episodes, seed=self.eval_seed, max_steps=self.max_steps, record=self.record
        )
        if not self.seeds or not all(0 <= seed < 2000 for seed in self.seeds):
            raise UserError(f"seeds must be one or more numbers from 0 to 1999, got {[*self.seeds]}.")


def run(config: LearnConfig, out: Path) -> dict[str, Any]:
    """Learn with every seed, write `learner.json` and return it."""
    if finished(out, config, RESULT):
        return read_object(out / RESULT)
    spec = env_spec(config.env, view=config.view)
    policy = _policy(config, spec.action_space)
    check_step_limit(spec, config.max_steps)
    try_step(config.env, view=config.view, distract=Distraction(), seed=config.eval_seed)
    if policy.network.use_state and not spec.state_names:
        raise UserError(
            f"{config.env} must have a robot state for policy.network.use_state, got none. Set "
            "policy.network.use_state=false, with policy.network.backbone=impala or patch."
        )
    config.learner.check(_tools(config, spec, policy, config.seeds[0], out / "frames"))
    begin_run(out, config)
    rows: list[dict[str, Any]] = []
    for seed in config.seeds:
        folder = out / f"seed{seed}"
        tools = _tools(config, spec, policy, seed, folder / "frames")
        for row in config.learner.learn(tools, folder):
            rows.append(row | {"seed": seed, "run": f"{folder.name}/{row['run']}"})  # noqa: PERF401
        shutil.rmtree(folder / "frames", ignore_errors=True)
    verdict = config.learner.verdict(rows)
    log.info(verdict)
    write_json(
        out / RESULT,
        {"learner": config.learner.kind, "env": config.env, "verdict": verdict, "rows": [*map(_slim, rows)]},
    )
    return read_object(out / RESULT)


def _slim(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what its `rollout.json` holds besides."""
    return {k: v for k, v in row.items() if k not in ("per_episode", "aggregated", "config", "lengths")}


def _policy(config: LearnConfig, actions: ActionSpace) -> PolicyConfig:
    """Return the settings of the policy that is trained.

    Raises:
        UserError: it does not output robot actions.
    """
    if config.start:
        policy = Policy.from_pretrained(config.start)
        if policy.spec.action_space is None or policy.config.kind != config.policy.kind:
            raise UserError(
                f"start must be a policy={config.policy.kind} that outputs robot actions, got {config.start} "
                f"with policy={policy.config.kind}. Give the folder of a train-policy or ground run."
            )
        return policy.config
    try:
        config.policy.targets(None, actions)
    except UserError as error:
        raise UserError(
            f"policy={config.policy.kind} must start from a policy that outputs robot actions, got no start. "
            "Give start=DIR, the folder of a ground run, or policy=bc."
        ) from error
    return config.policy


def _tools(config: LearnConfig, spec: Any, policy: PolicyConfig, seed: int, cache: Path) -> LearnerTools:
    resolution = config.resolution or (0 if uses_frames(policy) else BLACK)
    training = replace(config.training, seed=seed)
    first_seed = 10**6 * (seed + 1)

    def collected(folder: Path, episodes: int) -> Path:
        settings = collect.CollectConfig(
            env=config.env,
            out=str(folder),
            episodes=episodes,
            seed=first_seed,
            resolution=resolution,
            view=config.view,
            max_steps=config.max_steps,
            workers=1,
            frames=uses_frames(policy),
        )
        return collect.run(settings).path

    def frames(data: Path) -> dict[str, Any]:
        return {"path": str(data), "resolution": resolution, "cache_dir": str(cache)}

    def train(data: Path, folder: Path, only: str = "", episodes: int | None = None) -> Path:
        common: dict[str, Any] = {"training": training, "only": only, "labeled_episodes": episodes}
        common["held_out"] = 0.0
        if config.start:
            settings = finetune.FinetuneConfig(policy=config.start, data=DataConfig(**frames(data)), **common)
            return finetune.run(settings, folder)
        data_config = TrainingDataConfig(**frames(data))
        return train_policy.run(
            train_policy.TrainPolicyConfig(policy=policy, data=data_config, **common), folder
        )

    def evaluated(folder: Path, out: Path) -> dict[str, Any]:
        return rollout.evaluate(config, folder, out, record=config.record, temperature=config.temperature)

    return LearnerTools(
        env=spec,
        view=config.view,
        resolution=resolution,
        max_steps=config.max_steps,
        policy=policy,
        choose=selector(config.action_selection, config.temperature),
        data=config.data,
        first_seed=first_seed,
        seed=seed,
        expert=partial(rollout.evaluate_expert, config),
        collect=collected,
        train=train,
        open=lambda data: open_store(DataConfig(**frames(data))),
        rollout=evaluated,
    )


def summary(result: dict[str, Any]) -> list[str]:
    """Return a line per method and number of labels, over all seeds."""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["method"], row["labels"]), []).append(row)
    names = {key: f"{key[0]}, {key[1]} labels" if key[1] else key[0] for key in groups}
    return [f"{names[key]:22s} {(found := score(rows)).name} {found}" for key, rows in groups.items()]
