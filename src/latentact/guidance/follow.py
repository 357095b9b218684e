"""Follow a guide in an environment or on a robot, and keep the frames of the run."""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from latentact.data.decode.resize import resize
from latentact.envs.episode import Episode, EpisodeEnd, run_episodes
from latentact.envs.spec import VIEWS, env_spec, make_env
from latentact.errors import UserError
from latentact.guidance.guide import Guide
from latentact.guidance.inference import GuidedActor
from latentact.progress import Progress
from latentact.robots.connection import Robot
from latentact.robots.control import ControlEnd, ControlLog, control
from latentact.robots.safety import Safety
from latentact.robots.setup import RobotSetup, RobotView

log = logging.getLogger(__name__)


class FrameSpool:
    """Frames of one run in a temporary file, so that long runs do not fill the memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the spool)
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def append(self, frame: UInt8[np.ndarray, "h w 3"], /) -> None:
        """Add a frame of the same size as the previous ones."""
        self._shape, self._count = frame.shape, self._count + 1
        self._file.write(frame.tobytes())

    def __len__(self) -> int:
        """Number of frames."""
        return self._count

    @property
    def frames(self) -> UInt8[np.ndarray, "t h w 3"]:
        """All frames, memory-mapped."""
        self._file.flush()
        return np.memmap(self._file, np.uint8, "r+", shape=(self._count, *self._shape))


@dataclass(frozen=True, kw_only=True)
class FollowedGuide:
    """One run of a policy that follows a guide."""

    metrics: dict[str, Any]
    """Entries of `metrics.json`."""
    frames: FrameSpool
    """Frames of the LAM's camera before each action and, in an environment, after the last action."""
    fps: float
    """Control steps per second."""
    position: np.ndarray
    """Position in the guide of each control step."""
    guide: Guide | None
    """The guide that was followed; None if a camera showed none."""
    demonstration: FrameSpool
    """Frames of a live demonstration at each control step; otherwise empty."""
    error: BaseException | None = None
    """Error that ended the run early."""


def follow_in_env(
    actor: GuidedActor, env_name: str, *, seed: int, max_steps: int, source: str
) -> FollowedGuide:
    """Follow a guide for one episode of an environment.

    Args:
        actor: what follows the guide.
        env_name: as for `make_env`.
        seed: reset seed.
        max_steps: steps after which the episode ends; 0: no limit but the environment's own.
        source: origin of the policy, for messages.

    Raises:
        UserError: the policy does not match the environment, an action is invalid, or the environment fails
            before its first step.
    """
    agent = actor.agent.spec
    view = next(iter(agent.cameras), "").rpartition(".")[2]
    view = view if view in VIEWS else "agent"
    spec = env_spec(env_name, view=view)
    agent.check_env(spec, source)
    frames, demonstration = FrameSpool(), FrameSpool()
    env = make_env(env_name, view=view)
    try:
        with Progress("following the guide", max_steps, "steps") as progress:

            def on_step() -> None:
                progress.advance(1)
                _record_demonstration(actor, demonstration)

            (episode,) = run_episodes(
                actor,
                [env],
                [seed],
                camera=spec.camera,
                max_steps=max_steps,
                frames=[frames],
                on_step=on_step,
            )
    finally:
        env.close()
    if episode.error is not None and not episode.steps:
        raise episode.error
    error = episode.error or actor.error
    end = ControlEnd.ERROR if error else _end(episode, actor)
    metrics = {
        "end": end.name.lower(),
        "ended": str(error or end),
        "success": episode.success,
        "return": episode.total_reward,
        "largest_reward": max(episode.rewards, default=0.0),
        "steps": episode.steps,
        "fps": actor.fps,
    }
    return _followed(metrics, frames, actor, demonstration, error)


def _end(episode: Episode, actor: GuidedActor) -> ControlEnd:
    """Return the reason why an episode without an error ended."""
    if episode.end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
        return ControlEnd.ENVIRONMENT
    return ControlEnd.GUIDE_END if actor.ended else ControlEnd.MAX_STEPS


def follow_on_robot(
    actor: GuidedActor,
    setup: RobotSetup,
    robot: Robot,
    *,
    lam_camera: str,
    resolution: int,
    max_steps: int,
    source: str,
) -> FollowedGuide:
    """Follow a guide on a robot; an error or an interruption ends the run and is part of the result.

    Args:
        actor: what follows the guide.
        setup: cameras and limits of the robot.
        robot: the robot, not connected.
        lam_camera: camera of the LAM; if the robot does not have it, frames come from the policy's first.
        resolution: height and width of the recorded frames in pixels; 0: unchanged.
        max_steps: commands after which control ends; 0: no limit.
        source: origin of the policy, for messages.

    Raises:
        UserError: the policy does not match the robot, or the robot is stopped before a live demonstration
            can begin.
    """
    agent = actor.agent.spec
    view = RobotView(robot, setup.cameras)
    if agent.action_space.discrete:
        raise UserError(
            f"{source} must have continuous actions to drive a robot, got {agent.action_space}. "
            "Give a policy that was trained for the robot."
        )
    view.check_compatible(
        cameras=agent.cameras, state_size=agent.state_size, action_size=agent.action_space.size
    )
    if actor.startup_s >= setup.safety.stop_after_s:
        raise UserError(
            f"safety.stop_after_s must be more than the {actor.startup_s:g} s of video that the policy needs "
            f"before its first action, got {setup.safety.stop_after_s:g}. Increase it."
        )
    safety, record = Safety(view.joints, setup.safety), ControlLog(fps=actor.fps)
    if safety.unlimited:
        log.warning("no safety.limits for %s: commands are not clipped", ", ".join(safety.unlimited))
    camera = _robot_camera(view, (lam_camera, *agent.cameras))
    actor.warm_up(view(view.blank()))
    frames, demonstration = FrameSpool(), FrameSpool()
    error: BaseException | None = None
    log.info("driving %s at %g steps per second", robot.name, actor.fps)
    with Progress("driving the robot", max_steps, "steps") as progress:

        def on_observation(observation: dict[str, Any]) -> None:
            if camera:
                frames.append(resize(view(observation)[camera][None], resolution)[0])
            progress.advance(1)
            _record_demonstration(actor, demonstration)

        try:
            control(
                robot,
                lambda observation: actor.predict_action(view(observation)),
                safety,
                record,
                max_steps=max_steps or sys.maxsize,
                on_observation=on_observation,
            )
        except (UserError, KeyboardInterrupt, SystemExit) as stopped:
            error = stopped
    metrics = record.to_json() | {
        "robot": setup.robot,
        "refused": dict(safety.refused),
        "clipped": dict(safety.clipped),
        "without_limits": safety.unlimited,
    }
    return _followed(metrics, frames, actor, demonstration, error)


def _robot_camera(view: RobotView, preferred: tuple[str, ...]) -> str:
    """Return the image key of the first preferred camera that the robot has, or else its first; "": none."""
    keys = list(view.cameras.values())
    return next(iter([key for key in preferred if key in keys] or keys), "")


def _record_demonstration(actor: GuidedActor, demonstration: FrameSpool) -> None:
    """Add the newest frame of a live demonstration."""
    if (frame := actor.newest_frame) is not None:
        demonstration.append(frame)


def _followed(
    metrics: dict[str, Any],
    frames: FrameSpool,
    actor: GuidedActor,
    demonstration: FrameSpool,
    error: BaseException | None,
) -> FollowedGuide:
    return FollowedGuide(
        metrics=metrics | actor.to_json(),
        frames=frames,
        fps=actor.fps,
        position=np.asarray(actor.position, np.float64),
        guide=actor.guide,
        demonstration=demonstration,
        error=error,
    )
