"""Demonstrations of a person in any environment -> a LeRobot v3 dataset.

Attempt i uses seed `seed + i` and is staged in a folder next to the dataset as soon as it ends, so an
interrupted recording is resumed by the same command. For real robots use `lerobot-record`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from latentact.agents.agent import Agent
from latentact.agents.load import load_agent
from latentact.config import Between, Count, Limit, OneOf, Pixels, Seed
from latentact.data.lerobot.writer import (
    EpisodeBuffer,
    RecordSpec,
    require_lerobot,
    stage_episode,
    write_dataset,
)
from latentact.envs import episode as envs_episode
from latentact.envs.checks import check_step_limit
from latentact.envs.episode import Recorded, run_episodes
from latentact.envs.human import Human, Outcome, describe_keys
from latentact.envs.input_devices import Device, Terminal, Window
from latentact.envs.spec import VIEWS, EnvSpec, env_spec, make_env
from latentact.errors import UserError, require_one_of
from latentact.io.staging import locked_staging

log = logging.getLogger(__name__)

SIDECAR = "record.json"
"""File in a dataset's `meta` folder with the settings of the recording."""
DEVICES: dict[str, Callable[[], Device]] = {
    "keyboard": Window,
    "gamepad": lambda: Window(gamepad=True),
    "terminal": Terminal,
}


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Record demonstrations of a person by keyboard, gamepad or terminal as a LeRobot v3 dataset."""

    env: str
    """Environment: a suite, SUITE/LEVEL, or any Gymnasium id."""
    out: str
    """Folder of the new dataset."""
    device: Annotated[str, OneOf(DEVICES)] = "keyboard"
    """"keyboard" and "gamepad" open a window; "terminal" needs no display."""
    episodes: Count = 10
    """Episodes to record."""
    seed: Seed = 0
    """Seed of the first attempt; attempt i uses seed + i."""
    only_successes: bool = True
    """Whether to drop episodes that neither the environment nor you (enter) call a success."""
    policy: str = ""
    """Policy that acts while you press no key; a key takes over. Your actions are marked in the columns
    `intervention` and `labeled`."""
    realtime: bool = False
    """Whether an environment of discrete actions steps without a key; continuous ones do so in a window."""
    speed: Annotated[float, Between(0.05, 20)] = 1.0
    """Steps per second, relative to the environment's rate; + and - change it. Does not affect timestamps."""
    step_size: Annotated[float, Between(0.001, 1)] = 0.05
    """Change of an absolute continuous action by a held key per step, as a fraction of its range."""
    resolution: Pixels = 0
    """Height and width of the frames in pixels; 0: the environment's own."""
    view: Annotated[str, OneOf(VIEWS)] = "agent"
    """"agent": the agent's own view; "full": the whole world, for environments that have both."""
    max_steps: Limit = 0
    """Steps after which an episode ends; 0: the environment's own limit."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("--device", self.device, DEVICES)

    def identity(self) -> dict[str, Any]:
        """Return the settings that an interrupted recording must share."""
        left_out = ("out", "device", "episodes", "speed", "step_size", "realtime")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class RecordResult:
    """Result of a recording."""

    path: Path
    """The dataset."""
    episodes: int
    """Number of episodes."""
    dropped: int
    """Number of attempts that were dropped."""
    frames: int
    """Number of frames."""


def run(config: RecordConfig) -> RecordResult:
    """Record demonstrations, or resume an interrupted recording.

    Raises:
        UserError: the environment or the device cannot be used, the folder exists or is in use by another
            process, or nothing was recorded.
    """
    out = Path(config.out).absolute()
    if out.exists():
        raise UserError(
            f"{out} must be a new folder, got an existing one. Choose another; lerobot-edit-dataset merges "
            "datasets."
        )
    require_lerobot()
    spec = env_spec(config.env, view=config.view)
    check_step_limit(spec, config.max_steps)
    agent = load_agent(config.policy) if config.policy else None
    if agent is not None:
        agent.spec.check_env(spec, config.policy)
    env = make_env(config.env, resolution=config.resolution, view=config.view)
    staging = out.with_name(out.name + ".partial")
    keys = describe_keys(spec)
    with (
        closing(DEVICES[config.device]()) as device,  # before anything is written
        locked_staging(staging, out, config.identity(), "recording"),
    ):
        try:
            for line in keys:
                log.info("%s", line)
            attempts = _Attempts(staging)
            _record(config, env, spec, device, agent, attempts)
        finally:
            device.close()
            env.close()
        if not attempts.kept:
            raise UserError(f"no episode was recorded, so {out} is not written. Re-run the command.")
        height, width = env.observation_space["pixels"].shape[:2]  # type: ignore[index]
        record = RecordSpec.of_env(spec, height, width, takeover=agent is not None)
        dropped = len(attempts.all) - len(attempts.kept)
        staged = [attempts.path(number) for number in attempts.kept]
        rows = write_dataset(
            out, record, staged, sidecars={SIDECAR: {**config.identity(), "dropped": dropped}}
        )
        shutil.rmtree(staging)
    log.info("%s: %d episodes, %d frames, %d attempts dropped", out, len(staged), rows, dropped)
    return RecordResult(path=out, episodes=len(staged), dropped=dropped, frames=rows)


class _Attempts:
    """The attempts of a recording, as staged files."""

    def __init__(self, staging: Path) -> None:
        self._staging = staging

    def path(self, number: int) -> Path:
        return self._staging / f"{number:07d}.npz"

    @property
    def all(self) -> list[int]:
        files = self._staging.iterdir()
        return sorted(int(f.stem) for f in files if f.stem.isdigit() and f.suffix in (".npz", ".failed"))

    @property
    def kept(self) -> list[int]:
        return [number for number in self.all if self.path(number).exists()]

    def drop(self, number: int) -> None:
        self.path(number).with_suffix(".failed").touch()
        self.path(number).unlink(missing_ok=True)
        self.path(number).with_suffix(".mp4").unlink(missing_ok=True)

    def undo(self) -> str:
        """Drop the last episode that was kept."""
        if not (kept := self.kept):
            return "no episode to undo"
        self.drop(kept[-1])
        return f"episode {len(kept)} undone"


def _record(
    config: RecordConfig, env: Any, spec: EnvSpec, device: Device, agent: Agent | None, attempts: _Attempts
) -> None:
    """Run attempts until enough are kept or the person stops."""
    space = env.action_space
    low, high = (np.zeros(0, np.float32),) * 2 if spec.action_space.discrete else (space.low, space.high)
    human = Human(
        device,
        spec,
        low,
        high,
        realtime=config.realtime,
        policy=agent,
        step_size=config.step_size,
        on_undo=attempts.undo,
    )
    human.speed = config.speed
    record: set[Recorded] = {"actions", "states"} if spec.state_names else {"actions"}
    while (count := len(attempts.kept)) < config.episodes:
        number = max(attempts.all, default=-1) + 1
        human.title = f"episode {count + 1} of {config.episodes}"
        frames: list[np.ndarray] = []
        (played,) = run_episodes(
            human,
            [env],
            [config.seed + number],
            camera=spec.camera,
            max_steps=config.max_steps,
            frames=[frames],
            record=record,
        )
        if played.error is not None:
            raise UserError(f"{played.error} The episodes so far are kept. Re-run the command to resume.")
        if human.outcome is Outcome.STOP:
            return
        if human.outcome is Outcome.AGAIN or not played.steps:
            continue
        success = _success(played, human.outcome)
        if config.only_successes and not success:
            attempts.drop(number)
        else:
            episode = _episode(spec, played, frames, success)
            if agent is not None:
                own = np.array([*human.interventions, False])
                episode = replace(episode, executed_action=episode.action, intervention=own, labeled=own)
            stage_episode(attempts.path(number), RecordSpec.of_env(spec, *frames[0].shape[:2]), episode)
        device.show(frames[-1], "success" if success else "no success")
        log.info("attempt %d: %d steps, %s", number, played.steps, "success" if success else "no success")
        device.wait(0.5)


def _success(played: envs_episode.Episode, outcome: Outcome | None) -> bool:
    """Return what the person calls the episode, or else the environment at its last step."""
    if outcome in (Outcome.SUCCESS, Outcome.FAILURE):
        return outcome is Outcome.SUCCESS
    return bool(played.successes[-1])


def _episode(
    spec: EnvSpec, played: envs_episode.Episode, frames: list[np.ndarray], success: bool
) -> EpisodeBuffer:
    """Return the rows of an episode; the last one has the final observation and holds still."""
    last = played.actions[-1] if spec.hold is None else spec.hold
    reported = [bool(value) for value in played.successes[:-1]]
    return EpisodeBuffer(
        frames=np.stack(frames),
        state=np.stack(played.states) if spec.state_names else None,
        action=np.array([*played.actions, last], np.int64 if spec.action_space.discrete else np.float32),
        reward=np.array([*played.rewards, 0.0], np.float32),
        success=np.array([*reported, success, success]),
        task=played.task,
    )
