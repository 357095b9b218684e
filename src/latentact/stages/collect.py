"""Demonstrations of a scripted expert, or random play -> a LeRobot v3 dataset.

Attempt i uses seed `seed + i` and is staged in a folder next to the dataset, by several processes at once.
The successes with the lowest numbers become the episodes, in that order, so neither the number of workers nor
a kill changes a byte of the result. Re-run an interrupted command to resume it.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from latentact.config import Count, Fraction, Limit, OneOf, Pixels, Seed, Workers
from latentact.data.lerobot.writer import (
    EpisodeBuffer,
    RecordSpec,
    require_lerobot,
    stage_episode,
    write_dataset,
)
from latentact.envs import episode as envs_episode
from latentact.envs.checks import check_ranges, check_step_limit
from latentact.envs.distract import NUISANCE, Distraction
from latentact.envs.episode import (
    EnvBatch,
    EpisodeEnd,
    ExpertActor,
    RandomActor,
    Recorded,
    SeparateEnvs,
    batched_expert,
    run_batch,
)
from latentact.envs.spec import (
    ENVS,
    VIEWS,
    EnvError,
    EnvSpec,
    env_spec,
    make_env,
    make_expert,
)
from latentact.errors import UserError, require_between, require_one_of
from latentact.io.staging import locked_staging
from latentact.progress import Progress

log = logging.getLogger(__name__)

SIDECAR = "collect.json"
"""File in a dataset's `meta` folder with the settings of the collection."""
POLICIES = ("expert", "random")
PATIENCE = 20
"""Attempts after which a success rate below 10 % ends the collection."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Run a scripted expert and write its successful episodes, or random play, as a LeRobot v3 dataset."""

    env: Annotated[str, OneOf(ENVS)]
    """Environment, for demonstrations with an expert: a suite, or SUITE/LEVEL."""
    out: str
    """Folder of the new dataset."""
    policy: Annotated[str, OneOf(POLICIES)] = "expert"
    """"expert": the scripted expert, whose failed attempts are dropped; "random": uniformly random actions,
    of which every episode is kept, in any environment."""
    action_repeat: Count = 1
    """policy=random: steps for which each action is repeated. At high rates single random actions cancel out
    and move a robot hardly at all."""
    tasks: str = ""
    """With metaworld/all: its tasks, as in `drawer-open-v3,door-open-v3`; empty: all 50. Episodes are spread
    evenly over them."""
    episodes: Count = 100
    """Episodes to collect."""
    seed: Seed = 0
    """Seed of the first attempt; attempt i uses seed + i."""
    resolution: Pixels = 0
    """Height and width of the frames in pixels; 0: the environment's own."""
    view: Annotated[str, OneOf(VIEWS)] = "agent"
    """"agent": what the agent itself observes; "full": the whole world, for environments that have both."""
    workers: Workers = 0
    """Number of processes; 0: one per core. Does not affect the data."""
    explore: Fraction = 0.0
    """Probability of an exploratory action at each step. If the expert's action follows from the observation,
    latent actions carry no information; exploration makes them informative."""
    max_steps: Limit = 0
    """Steps after which an attempt fails; 0: the environment's own limit."""
    frames: bool = True
    """Whether frames are drawn; otherwise they are black, for policies on the robot state alone."""
    distract: str = ""
    """Distractors in the frames, each from 0 to 1: `background=0.5,shake=0.3,correlation=0.8`; their state is
    recorded as `observation.nuisance`. `appearance=0.5` gives every episode its own brightness, tint and
    background color."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        Distraction.parse(self.distract)
        if self.tasks and not self.env.endswith("/all"):
            raise UserError(
                f"tasks must be empty for {self.env}, got {self.tasks}. They are for metaworld/all; name a "
                "single task in the environment, as in metaworld/drawer-open-v3."
            )
        check_ranges(episodes=self.episodes, seed=self.seed, max_steps=self.max_steps)
        if self.workers < 0:
            raise UserError(f"workers must be at least 0, got {self.workers}. Use 0 for one per core.")
        require_one_of("policy", self.policy, POLICIES)
        if not 0 <= self.explore <= 1:
            raise UserError(f"explore must be between 0 and 1, got {self.explore}. Use 0 for none.")
        if self.explore and self.random:
            raise UserError(
                f"explore must be 0 with policy=random, whose actions are all random, got {self.explore}."
            )
        require_between("action_repeat", self.action_repeat, 1, 10**6)
        if self.action_repeat > 1 and not self.random:
            raise UserError(
                f"action_repeat must be 1 with policy=expert, got {self.action_repeat}. Use policy=random."
            )
        if self.resolution and not 16 <= self.resolution <= 2048:
            raise UserError(
                f"resolution must be 0 or between 16 and 2048 pixels, got {self.resolution}. Use 0 for the "
                "environment's own."
            )

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the data."""
        left_out = ("out", "workers", "distract", "tasks", "frames", "policy", "action_repeat")
        values = {k: v for k, v in asdict(self).items() if k not in left_out} | {"env": self.name}
        values |= {} if self.frames else {"frames": False}
        values |= {"policy": "random", "action_repeat": self.action_repeat} if self.random else {}
        return values | {"distract": self.distraction.settings} if self.distraction else values

    @property
    def random(self) -> bool:
        """Whether actions are random."""
        return self.policy == "random"

    @property
    def name(self) -> str:
        """Name of the environment, with its tasks."""
        return self.env.removesuffix("all") + self.tasks.replace(" ", "") if self.tasks else self.env

    @property
    def distraction(self) -> Distraction:
        """The distractors."""
        return Distraction.parse(self.distract)


@dataclass(frozen=True, kw_only=True)
class CollectResult:
    """Result of a collection."""

    path: Path
    """The dataset."""
    episodes: int
    """Number of episodes."""
    failed: int
    """Number of failed attempts, which are dropped."""
    frames: int
    """Number of frames."""
    existed: bool
    """Whether the dataset already existed, so that nothing was done."""


def run(config: CollectConfig) -> CollectResult:
    """Collect demonstrations, or resume an interrupted collection.

    Raises:
        UserError: the environment is unknown, has no expert or fails, the expert rarely succeeds, the folder
            holds something else or is in use by another process, or the disk is full.
    """
    out = Path(config.out).absolute()
    if out.exists():
        return _finished(config, out)
    require_lerobot()
    spec = env_spec(config.name, view=config.view)
    env = make_env(config.name, resolution=config.resolution, view=config.view, distract=config.distraction)
    env.reset(seed=config.seed)
    if not config.random:
        make_expert(config.name, env, config.seed)
    check_step_limit(spec, config.max_steps)
    height, width, _ = env.observation_space["pixels"].shape  # type: ignore[index]
    record = _record_spec(config, spec, height, width)
    staging = out.with_name(out.name + ".partial")
    try:
        settings = {k: v for k, v in config.identity().items() if k != "episodes"}
        with locked_staging(staging, out, settings, "collection"):
            numbers, failed = _run_attempts(config, staging)
            log.info("%s: writing %d episodes", out.name, len(numbers))
            staged = [_staged(staging, number) for number in numbers]
            sidecar = {**config.identity(), "failed": failed}
            rows = write_dataset(out, record, staged, sidecars={SIDECAR: sidecar})
            shutil.rmtree(staging)
    except (EnvError, BrokenProcessPool) as error:
        message = error if isinstance(error, EnvError) else f"a worker process of {config.name} died."
        raise UserError(
            f"{message} The attempts so far are kept in {staging}. Re-run the command to resume."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"the disk of {out.parent} is full. Free some space and re-run the command to resume."
            ) from error
        raise
    log.info("%s: %d episodes, %d frames, %d failed attempts dropped", out, len(numbers), rows, failed)
    return CollectResult(path=out, episodes=len(numbers), failed=failed, frames=rows, existed=False)


def _finished(config: CollectConfig, out: Path) -> CollectResult:
    """Return the result of the collection at `out`, if it has the same settings."""
    sidecar = out / "meta" / SIDECAR
    held = json.loads(sidecar.read_text()) if sidecar.is_file() else None
    settings = config.identity()
    names = {*settings, "distract", "frames", "policy", "action_repeat"}
    changed = [k for k in sorted(names) if held is not None and held.get(k) != settings.get(k)]
    if held is None or changed:
        what = f"a collection with different settings ({', '.join(changed)})" if changed else "other files"
        raise UserError(f"{out} holds {what}. Choose another folder or delete it.")
    info = json.loads((out / "meta" / "info.json").read_text())
    log.info("%s already exists; nothing to do", out)
    return CollectResult(
        path=out,
        episodes=info["total_episodes"],
        failed=held["failed"],
        frames=info["total_frames"],
        existed=True,
    )


def _run_attempts(config: CollectConfig, staging: Path) -> tuple[list[int], int]:
    """Run attempts until enough have succeeded; return their numbers and the count of failures among them."""
    tally = _Tally(config.name, config.episodes)
    for path in staging.iterdir():
        if path.stem.isdigit() and path.suffix in (".npz", ".failed"):
            tally.add(int(path.stem), path.suffix == ".npz")
    if tally.settled:
        log.info("resuming after %d attempts", tally.settled)
    workers = config.workers or os.cpu_count() or 1
    with Progress("collecting", config.episodes, "episodes", done=len(tally.successes)) as progress:
        for number, success in _attempts(config, staging, workers, tally):
            before = len(tally.successes)
            tally.add(number, success)
            progress.advance(len(tally.successes) - before)
    return tally.successes, tally.settled - len(tally.successes)


class _Tally:
    """Outcomes of attempts, counted in the order of their numbers."""

    def __init__(self, env: str, episodes: int) -> None:
        self.env, self.episodes = env, episodes
        self.known: dict[int, bool] = {}
        self.successes: list[int] = []
        self.settled = 0
        """Attempts 0 .. settled - 1 are finished."""

    @property
    def complete(self) -> bool:
        return len(self.successes) >= self.episodes

    def add(self, number: int, success: bool) -> None:
        self.known[number] = success
        while not self.complete and self.settled in self.known:
            if self.known[self.settled]:
                self.successes.append(self.settled)
            self.settled += 1
            if self.settled >= PATIENCE and len(self.successes) * 10 < self.settled:
                raise UserError(
                    f"the expert of {self.env} must solve at least 10 % of the attempts, got "
                    f"{len(self.successes)} of {self.settled}. Choose another environment or a larger "
                    "--max-steps."
                )


def _attempts(
    config: CollectConfig, staging: Path, workers: int, tally: _Tally
) -> Iterator[tuple[int, bool]]:
    """Run the attempts that are not finished, in any order, until the tally is complete."""
    size = min(_batch(config, env_spec(config.name, view=config.view)), config.episodes)
    workers = min(workers, -(-config.episodes // size))
    todo = itertools.batched((number for number in itertools.count() if number not in tally.known), size)
    if workers == 1:
        while not tally.complete:
            numbers = next(todo)
            yield from zip(numbers, _attempt(config, staging, numbers), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_exit_with_parent) as pool:
        running: dict[Future[list[bool]], tuple[int, ...]] = {}
        try:
            while not tally.complete:
                while len(running) < workers * (4 if size == 1 else 1):
                    numbers = next(todo)
                    running[pool.submit(_attempt, config, staging, numbers)] = numbers
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield from zip(running.pop(future), future.result(), strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _exit_with_parent() -> None:
    """Ignore Ctrl-C, and exit when the parent process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _environment(name: str, resolution: int, view: str, distract: Distraction, frames: bool) -> Any:
    return make_env(name, resolution=resolution, view=view, distract=distract, frames=frames)


def _staged(staging: Path, number: int) -> Path:
    return staging / f"{number:07d}.npz"


def _record_spec(config: CollectConfig, spec: EnvSpec, height: int, width: int) -> RecordSpec:
    return RecordSpec.of_env(spec, height, width, nuisance_names=NUISANCE if config.distraction.moves else ())


def _attempt(config: CollectConfig, staging: Path, numbers: Sequence[int]) -> list[bool]:
    """Run attempts and stage them; return whether they succeeded."""
    spec = env_spec(config.name, view=config.view)
    outcomes = []
    for number, played in zip(numbers, _play(config, spec, numbers), strict=True):
        episode = _demonstration(config, spec, played)
        path = _staged(staging, number)
        if episode is None:
            path.with_suffix(".failed").touch()
        else:
            stage_episode(path, _record_spec(config, spec, *episode.frames.shape[1:3]), episode)
        outcomes.append(episode is not None)
    return outcomes


def _batch(config: CollectConfig, spec: EnvSpec) -> int:
    """Return how many attempts are computed at once; only the expert's, with frames and no distractors."""
    return 1 if config.distraction or not config.frames or config.random else spec.batch


def _play(config: CollectConfig, spec: EnvSpec, numbers: Sequence[int]) -> list[envs_episode.Episode]:
    """Return the episodes, computed at once where the suite can."""
    seeds = [config.seed + number for number in numbers]
    envs: EnvBatch
    if _batch(config, spec) > 1:
        envs, actor = batched_expert(config.name, seeds, config.explore)
    else:
        env = _environment(config.name, config.resolution, config.view, config.distraction, config.frames)
        envs = SeparateEnvs([env])
        if config.random:
            actor = RandomActor(spec.action_space, [env], seeds, config.action_repeat)
        else:
            actor = ExpertActor(config.name, [env], seeds, config.explore)
    record: set[Recorded] = {"actions"}
    if spec.state_names:
        record.add("states")
    if config.distraction.moves:
        record.add("nuisances")
    return run_batch(
        actor,
        envs,
        seeds,
        camera=spec.camera,
        max_steps=config.max_steps,
        frames=[[] for _ in seeds],
        record=record,
    )


def _demonstration(
    config: CollectConfig, spec: EnvSpec, played: envs_episode.Episode
) -> EpisodeBuffer | None:
    """Return what is written of an episode, or None if the expert did not succeed."""
    if played.error is not None:
        raise played.error
    successes = [bool(success) for success in played.successes]
    scored = played.success is not None
    if played.end is EpisodeEnd.ACTOR or (scored and not successes[-1] and not config.random):
        return None
    last = played.actions[-1] if spec.hold is None else spec.hold
    dtype = np.int64 if spec.action_space.discrete else np.float32
    return EpisodeBuffer(
        frames=np.stack(played.frames),  # type: ignore[arg-type]
        state=np.stack(played.states) if spec.state_names else None,
        action=np.array([*played.actions, last], dtype),
        reward=np.array([*played.rewards, 0.0], np.float32),
        success=np.array([*successes, scored]),
        task=played.task,
        nuisance=np.stack(played.nuisances) if config.distraction.moves else None,
    )
