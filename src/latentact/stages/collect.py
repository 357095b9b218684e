"""Demonstrations of a scripted expert -> a LeRobot v3 dataset.

Attempt number i is played with seed `seed + i` and staged in a folder next to the dataset, by several
processes at once. The successes with the lowest numbers become the episodes, in that order, so neither the
number of workers nor a kill in the middle changes a byte of the result. The same command again goes on where
it was killed.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from latentact.data.lerobot.writer import Episode, RecordSpec, require_lerobot, stage_episode, write_dataset
from latentact.envs.checks import check_ranges, check_step_limit
from latentact.envs.distract import NUISANCE, Distraction
from latentact.envs.spec import EnvError, EnvSpec, ExpertStuckError, env_spec, make_env, make_expert
from latentact.errors import UserError
from latentact.progress import Progress

log = logging.getLogger(__name__)

SIDECAR = "collect.json"
"""File in a dataset's `meta` folder that says how it was collected."""
PATIENCE = 20
"""Attempts before a success rate under one in ten ends the collection."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Play a scripted expert and keep its successful episodes as a LeRobot v3 dataset."""

    env: str
    """Environment with an expert: `babyai/<Level>` or `pusht`."""
    out: str
    """Folder of the new dataset."""
    episodes: int = 100
    """Successful episodes to collect."""
    seed: int = 0
    """Seed of the first attempt; attempt i uses seed + i."""
    resolution: int = 0
    """Height and width of the frames in pixels; 0: the environment's own."""
    view: str = "agent"
    """"agent": what the agent sees; "full": the whole world, where an environment has both."""
    workers: int = 0
    """Processes that play; 0: one per core. Changes nothing in the data."""
    explore: float = 0.0
    """Share of the steps that take an exploring action, not the expert's. An expert whose action follows
    from what it sees leaves a latent action nothing to say; some exploration makes it needed."""
    max_steps: int = 0
    """Steps after which an attempt has failed; 0: the environment's own limit."""
    distract: str = ""
    """Distractors in the frames, each 0 to 1: `background=0.5,shake=0.3,correlation=0.8`. Their state is
    recorded as `observation.nuisance`."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        Distraction.parse(self.distract)
        check_ranges(episodes=self.episodes, seed=self.seed, max_steps=self.max_steps)
        if self.workers < 0:
            raise UserError(f"workers must be 0 or more, got {self.workers}. Give 0 for one per core.")
        if not 0 <= self.explore <= 1:
            raise UserError(f"explore is {self.explore}; wanted a share of the steps, from 0 to 1.")
        if self.resolution and not 16 <= self.resolution <= 2048:
            raise UserError(f"resolution is {self.resolution}; wanted 16 to 2048 pixels, or 0.")

    def identity(self) -> dict[str, Any]:
        """Return the settings that the data depends on."""
        values = {k: v for k, v in asdict(self).items() if k not in ("out", "workers", "distract")}
        return values | {"distract": vars(self.distraction)} if self.distraction else values

    @property
    def distraction(self) -> Distraction:
        """The distractors."""
        return Distraction.parse(self.distract)


@dataclass(frozen=True, kw_only=True)
class CollectResult:
    """What a collection ended with."""

    path: Path
    """The dataset."""
    episodes: int
    """Successful episodes in it."""
    failed: int
    """Attempts that failed and were dropped."""
    frames: int
    """Rows in it."""
    existed: bool
    """Whether it was there already and nothing was done."""


def run(config: CollectConfig) -> CollectResult:
    """Collect demonstrations, or go on with a collection that was killed.

    Raises:
        UserError: unknown environment, no expert, an expert that hardly ever succeeds, an environment that
            fails, a folder that holds something else, another process at work on it, or a full disk.
    """
    out = Path(config.out).absolute()
    if out.exists():
        return _finished(config, out)
    require_lerobot()
    spec = env_spec(config.env, view=config.view)
    env = make_env(config.env, resolution=config.resolution, view=config.view, distract=config.distraction)
    env.reset(seed=config.seed)
    make_expert(config.env, env, config.seed)
    check_step_limit(spec, config.max_steps)
    height, width, _ = env.observation_space["pixels"].shape  # type: ignore[index]
    record = _record_spec(config, spec, height, width)
    staging = out.with_name(out.name + ".partial")
    try:
        with _claimed(staging, config):
            numbers, failed = _play(config, staging)
            log.info("%s: writing %d episodes", out.name, len(numbers))
            staged = [_staged(staging, number) for number in numbers]
            sidecar = {**config.identity(), "failed": failed}
            rows = write_dataset(out, record, staged, sidecars={SIDECAR: sidecar})
            shutil.rmtree(staging)
    except (EnvError, BrokenProcessPool) as error:
        said = error if isinstance(error, EnvError) else f"a process that played {config.env} died."
        raise UserError(
            f"{said} The attempts so far are kept in {staging}; the same command again resumes."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"the disk of {out.parent} is full; free some space and run the same again."
            ) from error
        raise
    log.info("%s: %d episodes, %d frames, %d failed attempts dropped", out, len(numbers), rows, failed)
    return CollectResult(path=out, episodes=len(numbers), failed=failed, frames=rows, existed=False)


def _finished(config: CollectConfig, out: Path) -> CollectResult:
    """Return what lies at `out` if it is this very collection."""
    sidecar = out / "meta" / SIDECAR
    held = json.loads(sidecar.read_text()) if sidecar.is_file() else None
    wanted = config.identity()
    names = {*wanted, "distract"}
    if held is None or any(held.get(k) != wanted.get(k) for k in names):
        changed = [k for k in sorted(names) if held is not None and held.get(k) != wanted.get(k)]
        what = f"a collection with different settings ({', '.join(changed)})" if changed else "something else"
        raise UserError(f"{out} holds {what}; choose another folder or delete it.")
    info = json.loads((out / "meta" / "info.json").read_text())
    log.info("%s is already collected; nothing to do", out)
    return CollectResult(
        path=out,
        episodes=info["total_episodes"],
        failed=held["failed"],
        frames=info["total_frames"],
        existed=True,
    )


@contextmanager
def _claimed(staging: Path, config: CollectConfig) -> Iterator[None]:
    """Make the staging folder ours: for this collection, and for one process at a time."""
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {staging} ({error.strerror}); choose another folder.") from error
    try:
        lock = FileLock(staging / "lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another process is collecting into {config.out}; wait for it or choose another."
        ) from error
    with lock:
        note = staging / "collect.json"
        wanted = {k: v for k, v in config.identity().items() if k != "episodes"}
        if not note.exists():
            draft = note.with_suffix(".tmp")
            draft.write_text(json.dumps(wanted))
            draft.replace(note)
        if json.loads(note.read_text()) != wanted:
            raise UserError(
                f"{staging} holds an unfinished collection with other settings; delete it or finish it."
            )
        yield


def _play(config: CollectConfig, staging: Path) -> tuple[list[int], int]:
    """Play attempts until enough have succeeded; return those and how many failed before the last of them."""
    tally = _Tally(config.env, config.episodes)
    for path in staging.iterdir():
        if path.stem.isdigit() and path.suffix in (".npz", ".failed"):
            tally.add(int(path.stem), path.suffix == ".npz")
    if tally.settled:
        log.info("going on after %d attempts", tally.settled)
    workers = min(config.workers or os.cpu_count() or 1, config.episodes)
    with Progress("collecting", config.episodes, "episodes", done=len(tally.successes)) as progress:
        for number, success in _attempts(config, staging, workers, tally):
            before = len(tally.successes)
            tally.add(number, success)
            progress.advance(len(tally.successes) - before)
    return tally.successes, tally.settled - len(tally.successes)


class _Tally:
    """Attempts in the order of their numbers, however they come in."""

    def __init__(self, env: str, episodes: int) -> None:
        self.env, self.episodes = env, episodes
        self.known: dict[int, bool] = {}
        self.successes: list[int] = []
        self.settled = 0
        """Attempts 0 .. settled - 1 are known."""

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
                    f"the expert of {self.env} solved {len(self.successes)} of {self.settled} attempts; "
                    "choose another environment or a larger --max-steps."
                )


def _attempts(
    config: CollectConfig, staging: Path, workers: int, tally: _Tally
) -> Iterator[tuple[int, bool]]:
    """Play attempts that are not known yet, in any order, until the tally is complete."""
    todo = (n for n in _count() if n not in tally.known)
    if workers == 1:
        while not tally.complete:
            number = next(todo)
            yield number, _attempt(config, staging, number)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_live_with_parent) as pool:
        running: dict[Future[bool], int] = {}
        try:
            while not tally.complete:
                while len(running) < 4 * workers:
                    number = next(todo)
                    running[pool.submit(_attempt, config, staging, number)] = number
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _live_with_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _environment(name: str, resolution: int, view: str, distract: Distraction) -> tuple[Any, EnvSpec]:
    env = make_env(name, resolution=resolution, view=view, distract=distract)
    return env, env_spec(name, view=view)


def _staged(staging: Path, number: int) -> Path:
    return staging / f"{number:07d}.npz"


def _record_spec(config: CollectConfig, spec: EnvSpec, height: int, width: int) -> RecordSpec:
    return RecordSpec(
        fps=spec.fps,
        camera=spec.camera,
        height=height,
        width=width,
        action_space=spec.action_space,
        action_names=spec.action_names,
        state_names=spec.state_names,
        robot_type=spec.name,
        nuisance_names=NUISANCE if config.distraction else (),
    )


def _attempt(config: CollectConfig, staging: Path, number: int) -> bool:
    """Play one attempt and stage it; return whether it succeeded."""
    env, spec = _environment(config.env, config.resolution, config.view, config.distraction)
    episode = _demonstrate(config, env, spec, config.seed + number)
    path = _staged(staging, number)
    if episode is None:
        path.with_suffix(".failed").touch()
        return False
    stage_episode(path, _record_spec(config, spec, *episode.frames.shape[1:3]), episode)
    return True


def _demonstrate(config: CollectConfig, env: Any, spec: EnvSpec, seed: int) -> Episode | None:
    """Return the expert's episode, or None where it does not succeed."""
    observation, info = env.reset(seed=seed)
    expert = make_expert(config.env, env, seed)
    rng = np.random.default_rng((seed, 1))
    observations, actions, rewards, successes, ended = [observation], [], [], [], False
    nuisances = [info.get("nuisance")]
    while not ended and not (config.max_steps and len(actions) == config.max_steps):
        try:
            action = expert.act(rng if rng.random() < config.explore else None)
        except ExpertStuckError:
            return None
        observation, reward, terminated, truncated, outcome = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
        successes.append(outcome.get("is_success", False))
        nuisances.append(outcome.get("nuisance"))
        ended = terminated or truncated
    if not successes[-1]:
        return None
    actions.append(actions[-1] if spec.hold is None else spec.hold)
    return Episode(
        frames=np.stack([o["pixels"] for o in observations]),
        state=np.stack([o["agent_pos"] for o in observations]) if spec.state_names else None,
        action=np.array(actions, np.int64 if spec.action_space.discrete else np.float32),
        reward=np.array([*rewards, 0.0], np.float32),
        success=np.array([*successes, True]),
        task=info["task"],
        nuisance=np.stack(nuisances) if config.distraction else None,
    )
