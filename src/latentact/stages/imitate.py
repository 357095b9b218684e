"""Imitate one demonstration video, or a live camera: `latentact imitate --video-path V --policy-path P ...`.

The output folder holds the guide (`latents.safetensors`, `latents.pt`) and, if a policy acted,
`metrics.json`, the video `imitation.mp4` (demonstration | rollout) and the page `report.html`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import UInt8

from latentact.config import Limit, OneOf, Pixels, Rate, Seconds, Seed
from latentact.data.decode.resize import resize
from latentact.device import require_device
from latentact.envs.checks import check_ranges
from latentact.envs.episode import Episode, EpisodeEnd, run_episodes
from latentact.envs.spec import ENVS, VIEWS, env_spec, make_env
from latentact.errors import UserError, require_one_of
from latentact.guidance.align import TIME_BASES, latent_agreement
from latentact.guidance.capture import Capture, open_source
from latentact.guidance.edits import blend
from latentact.guidance.extractor import LatentActionExtractor, video_frames
from latentact.guidance.guide import Guide
from latentact.guidance.inference import LatentGuidedInference
from latentact.guidance.live import LiveInference, blank_guide
from latentact.io.atomic import write_json
from latentact.io.video_writer import write_video
from latentact.progress import Progress
from latentact.reporting.pages.imitate import write_page
from latentact.robots.control import ControlEnd, ControlLog, control
from latentact.robots.safety import Safety
from latentact.robots.setup import RobotSetup, RobotView, make_robot

log = logging.getLogger(__name__)

MODES = ("extract_only", "simulation", "robot")
VIDEO = "imitation.mp4"
METRICS = "metrics.json"
PAGE = "report.html"
STILLS = 6


@dataclass(frozen=True, kw_only=True)
class ImitateConfig:
    """Imitate one demonstration video with a policy, in simulation or on a robot."""

    output_dir: str
    """Output folder; an older result is replaced."""
    video_path: tuple[str, ...] = ()
    """The demonstration; several are blended by --blend."""
    guide: str = ""
    """Guide of an earlier run or of `guide`, instead of the video."""
    live: str = ""
    """Camera to follow while it films, instead of the video: opencv:0, opencv:/dev/video0,fps=30, any
    TYPE:key=value,... of LeRobot, or a video file, which is played at its own rate."""
    max_age: Seconds = 0.0
    """live: age in seconds above which a frame is stale; 0: two periods of the guide."""
    blend: str = ""
    """Weights of several videos, for example 0.5,0.5."""
    policy_path: str = ""
    """Folder or hub id of a policy that is conditioned on latent actions."""
    lam_model_path: str = ""
    """Folder or hub id of the LAM that the policy was trained with."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    target_fps: Rate = 0.0
    """Frames per second at which the video is read; 0: the LAM's."""
    max_frames: Limit = 0
    """Maximum number of video frames; 0: all."""
    lam_resolution: Pixels = 224
    """Height and width to which frames are resized before the LAM; 0: unchanged."""
    mode: Annotated[str, OneOf(MODES)] = "simulation"
    """extract_only, simulation or robot."""
    env_name: Annotated[str, OneOf(ENVS)] = "PushT-v0"
    """simulation: PushT-v0, babyai/LEVEL, or any Gymnasium id, also PACKAGE:ID and PACKAGE/NAME. A time limit
    is not needed, since the guide ends."""
    seed: Seed = 0
    """simulation: reset seed of the environment."""
    robot_config: str = ""
    """robot: YAML file with the robot, its limits and its cameras."""
    max_steps: Limit = 0
    """Maximum number of actions; 0: until the guide ends."""
    control_time_s: Seconds = 0.0
    """Maximum seconds of control; 0: until the guide ends."""
    fps: Rate = 0.0
    """Control steps per second; 0: the environment's, on a robot the policy's, or else the guide's."""
    time_base: Annotated[str, OneOf(TIME_BASES)] = "hold"
    """Alignment of a guide with a different rate: hold each latent action, or resample in time."""
    render: bool = True
    """Whether the page and the video show frames of the run."""
    save_video: bool = True
    """Whether the video is written."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("--mode", self.mode, MODES)
        if isinstance(self.video_path, str):
            object.__setattr__(self, "video_path", (self.video_path,) if self.video_path else ())
        if sum(map(bool, (self.video_path, self.guide, self.live))) != 1:
            given = "several" if self.video_path or self.guide or self.live else "none"
            raise UserError(
                f"exactly one of --video-path, --guide and --live must be given, got {given}. Give the video "
                "of a demonstration, its guide, or a camera."
            )
        if (len(self.video_path) > 1) != bool(self.blend):
            raise UserError(
                "--blend must be given if and only if there are several videos, got "
                f"{self.blend or 'none'} for {len(self.video_path)}. Give one weight per --video-path."
            )
        if not self.guide and not self.lam_model_path:
            raise UserError("--lam-model-path must be given, got none. Give the LAM that extracts the guide.")
        if self.mode != "extract_only" and not self.policy_path:
            raise UserError("--policy-path must be given, got none. Give the policy that follows the guide.")
        if self.mode == "robot" and not self.robot_config:
            raise UserError("--robot-config must be given, got none. Give the YAML file of the robot.")
        if self.live and (self.mode == "extract_only" or self.time_base != "hold"):
            raise UserError(
                "--live must have --mode simulation or robot and --time-base hold, got "
                f"{self.mode} and {self.time_base}. For other modes, record a video."
            )
        if self.max_age and not self.live:
            raise UserError(f"--max-age must be given with --live only, got {self.max_age:g}. Remove it.")
        for name in ("target_fps", "max_frames", "max_steps", "control_time_s", "fps", "max_age"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} must be at least 0 and finite, got {getattr(self, name)}. Use 0 for the default."
                )
        check_ranges(seed=self.seed, max_steps=self.max_steps)


def run(config: ImitateConfig) -> dict[str, Any]:
    """Extract the guide, run the policy and return the content of `metrics.json`.

    Raises:
        UserError: video, LAM, policy, environment or robot do not match, or one of them fails.
    """
    require_device(config.device)
    out = Path(config.output_dir)
    if out.exists() and not out.is_dir():
        raise UserError(f"--output-dir must be a folder, got the file {out}. Choose another.")
    setup = RobotSetup.read(config.robot_config) if config.mode == "robot" else None
    robot = make_robot(setup.robot) if setup else None
    extractor = None
    if config.lam_model_path:
        extractor = LatentActionExtractor(config.lam_model_path, config.lam_resolution, config.device)
    with _capture(config, extractor) as capture:
        guide, lengths = _guide(config, extractor, capture)
        if config.mode == "extract_only":
            out.mkdir(parents=True, exist_ok=True)
            guide.save(out)
            return _about_guide(config, guide)

        def follower(inference: LatentGuidedInference) -> LatentGuidedInference | LiveInference:
            if capture is None or extractor is None:
                return inference
            return LiveInference(inference, extractor, capture, config.max_age)

        result = (
            _run_on_robot(config, guide, setup, robot, follower)
            if setup
            else _simulate(config, guide, follower)
        )
    if result.guide is None:  # a camera that was lost before it showed anything
        raise result.error or UserError(f"{config.live} must have at least one latent action, got none.")
    guide = result.guide
    out.mkdir(parents=True, exist_ok=True)
    for old in (METRICS, PAGE, VIDEO):
        (out / old).unlink(missing_ok=True)
    guide.save(out)
    metrics = {**_about_guide(config, guide), **result.metrics, "agreement": None}
    if isinstance(result.error, (KeyboardInterrupt, SystemExit)):
        write_json(out / METRICS, metrics)
        raise result.error
    if extractor is not None and len(result.frames) and not extractor.model.state_size:
        metrics["agreement"] = _agreement(guide, extractor, result)
    frames = _compose(config, guide, lengths, result) if config.render and len(result.frames) else None
    if frames is not None and config.save_video:
        write_video(out / VIDEO, frames, result.fps)
    write_json(out / METRICS, metrics)
    stills = None if frames is None else frames[np.linspace(0, len(frames) - 1, STILLS).astype(int)]
    write_page(out / PAGE, metrics, stills, out / VIDEO if (out / VIDEO).exists() else None)
    if result.error is not None:
        raise result.error
    log.info("%s: %s", out, metrics["ended"])
    return metrics


@contextlib.contextmanager
def _capture(config: ImitateConfig, extractor: LatentActionExtractor | None) -> Iterator[Capture | None]:
    """Open the live camera, and close it after the block; None without one."""
    if not config.live or extractor is None:
        yield None
        return
    capture = Capture(open_source(config.live, extractor, config.target_fps), config.max_frames)
    with contextlib.closing(capture):
        limited = config.max_frames or config.max_steps or config.control_time_s or config.mode == "robot"
        if capture.source.endless and not limited:
            raise UserError(
                "--max-steps, --control-time-s or --max-frames must be given with a camera in simulation, "
                "got none. Set a limit."
            )
        yield capture


def _guide(
    config: ImitateConfig, extractor: LatentActionExtractor | None, capture: Capture | None
) -> tuple[Guide, tuple[int, ...]]:
    """Return the guide, and the number of latent actions of each video; of a camera, a blank one."""
    if capture is not None:
        assert extractor is not None
        return blank_guide(extractor, capture.source.fps), ()
    if config.video_path:
        assert extractor is not None
        guides = [extractor.extract(path, config.target_fps, config.max_frames) for path in config.video_path]
        guide = blend(guides, config.blend, "--blend") if config.blend else guides[0]
        return guide, tuple(map(len, guides))
    guide = Guide.load(config.guide)
    if extractor is not None and extractor.model.spec.weights != guide.spec.weights:
        raise UserError(
            f"{config.guide} must come from the LAM {config.lam_model_path}, got other weights. "
            "Give the LAM that extracted it, or extract it again."
        )
    return guide, ()


def _about_guide(config: ImitateConfig, guide: Guide) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "guide": {"source": ", ".join(config.video_path) or config.guide or config.live, **guide.about()},
    }


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
class Result:
    """One run of the policy."""

    metrics: dict[str, Any]
    """Entries of `metrics.json`."""
    frames: FrameSpool
    """Frames of the LAM's camera before each action and, in simulation, after the last action."""
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


type Follow = Callable[[LatentGuidedInference], LatentGuidedInference | LiveInference]


def _simulate(config: ImitateConfig, guide: Guide, follower: Follow) -> Result:
    """Follow the guide in an environment.

    Raises:
        UserError: an action is invalid, or the environment fails before its first step.
    """
    name = config.env_name
    inference = LatentGuidedInference(
        config.policy_path,
        guide,
        fps=float(config.fps or env_spec(name).fps),
        time_base=config.time_base,
        device=config.device,
    )
    agent = inference.agent.spec
    view = next(iter(agent.cameras), "").rpartition(".")[2]
    spec = env_spec(name, view=view if view in VIEWS else "agent")
    agent.check_env(spec, config.policy_path)
    actor = follower(inference)
    live = actor if isinstance(actor, LiveInference) else None
    frames, demonstration, steps = FrameSpool(), FrameSpool(), _steps(config, actor)
    env = make_env(name, view=view if view in VIEWS else "agent")
    try:
        with Progress("following the guide", steps, "steps") as progress:

            def on_step() -> None:
                progress.advance(1)
                _film(actor, demonstration)

            (episode,) = run_episodes(
                actor,
                [env],
                [config.seed],
                camera=spec.camera,
                max_steps=steps,
                frames=[frames],
                on_step=on_step,
            )
    finally:
        env.close()
    if episode.error is not None and not episode.steps:
        raise episode.error
    error = episode.error or (live and live.error)
    metrics = {
        "ended": str(error) if error else _ending(episode, actor),
        "success": episode.success,
        "return": episode.total_reward,
        "largest_reward": max(episode.rewards, default=0.0),
        "steps": episode.steps,
        "fps": inference.fps,
    }
    return _result(metrics, frames, actor, demonstration, error)


def _result(
    metrics: dict[str, Any],
    frames: FrameSpool,
    actor: LatentGuidedInference | LiveInference,
    demonstration: FrameSpool,
    error: BaseException | None,
) -> Result:
    return Result(
        metrics=metrics | ({"live": actor.to_json()} if isinstance(actor, LiveInference) else {}),
        frames=frames,
        fps=actor.fps,
        position=np.asarray(actor.position, np.float64),
        guide=actor.guide,
        demonstration=demonstration,
        error=error,
    )


def _film(actor: LatentGuidedInference | LiveInference, demonstration: FrameSpool) -> None:
    """Add the newest frame of a live demonstration."""
    if isinstance(actor, LiveInference) and actor.newest_frame is not None:
        demonstration.append(actor.newest_frame)


def _ending(episode: Episode, actor: LatentGuidedInference | LiveInference) -> str:
    """Return the reason why an episode ended, as text."""
    if episode.end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
        return "the environment ended the episode"
    if isinstance(actor, LiveInference):
        return ControlEnd.GUIDE_END if actor.ended else ControlEnd.MAX_STEPS
    return ControlEnd.GUIDE_END if episode.steps == len(actor) else ControlEnd.MAX_STEPS


def _run_on_robot(
    config: ImitateConfig, guide: Guide, setup: RobotSetup, robot: Any, follower: Follow
) -> Result:
    """Follow the guide on a robot."""
    inference = LatentGuidedInference(
        config.policy_path, guide, fps=config.fps, time_base=config.time_base, device=config.device
    )
    agent = inference.agent.spec
    view = RobotView(robot, setup.cameras)
    if agent.action_space.discrete:
        raise UserError(
            f"{config.policy_path} must have continuous actions to drive a robot, got {agent.action_space}. "
            "Give a policy that was trained for the robot."
        )
    view.check_compatible(
        cameras=agent.cameras, state_size=agent.state_size, action_size=agent.action_space.size
    )
    safety, record, frames = Safety(view.joints, setup.safety), ControlLog(fps=inference.fps), FrameSpool()
    if safety.unlimited:
        log.warning("no safety.limits for %s: commands are not clipped", ", ".join(safety.unlimited))
    camera = _camera(view, agent.cameras, guide)
    inference.predict_action(
        view(view.blank())
    )  # the first call is slow, and fails if policy and robot do not match
    inference.reset()
    error: BaseException | None = None
    actor, demonstration = follower(inference), FrameSpool()
    if isinstance(actor, LiveInference) and actor.startup_s >= setup.safety.stop_after_s:
        raise UserError(
            f"safety.stop_after_s must be more than the {actor.startup_s:g} s of video that the policy needs "
            f"before its first action, got {setup.safety.stop_after_s:g}. Increase it."
        )
    steps = _steps(config, actor)
    log.info("driving %s at %g steps per second", robot.name, inference.fps)
    with Progress("driving the robot", steps, "steps") as progress:

        def on_observation(observation: dict[str, Any]) -> None:
            if camera:
                frames.append(resize(view(observation)[camera][None], config.lam_resolution)[0])
            progress.advance(1)
            _film(actor, demonstration)

        try:
            control(
                robot,
                lambda observation: actor.predict_action(view(observation)),
                safety,
                record,
                max_steps=steps or sys.maxsize,
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
    return _result(metrics, frames, actor, demonstration, error)


def _camera(view: RobotView, cameras: tuple[str, ...], guide: Guide) -> str:
    """Return the image key for the LAM: its own camera, or the policy's first."""
    keys = list(view.cameras.values())
    preferred = [key for key in (guide.spec.camera, *cameras) if key in keys]
    return next(iter(preferred or keys), "")


def _steps(config: ImitateConfig, actor: LatentGuidedInference | LiveInference) -> int:
    """Return the number of control steps: the minimum of guide, maximum steps and time limit; 0: no limit."""
    guide = 0 if isinstance(actor, LiveInference) else len(actor)
    limits = [guide, config.max_steps, int(config.control_time_s * actor.fps + 1e-6)]
    if config.control_time_s and not limits[2]:
        raise UserError(
            f"--control-time-s must be at least one step of {1 / actor.fps:g} s, got "
            f"{config.control_time_s:g}. Increase it."
        )
    return min((limit for limit in limits if limit), default=0)


def _agreement(guide: Guide, extractor: LatentActionExtractor, result: Result) -> dict[str, Any]:
    """Compare the latent actions of the run with the guide; if that is impossible, `why` gives the reason."""
    try:
        achieved = extractor.extract_from_frames(result.frames.frames, result.fps)
    except UserError as error:
        return {"measure": None, "why": str(error)}
    return latent_agreement(guide, achieved, result.position)


def _compose(
    config: ImitateConfig, guide: Guide, lengths: tuple[int, ...], result: Result
) -> UInt8[np.ndarray, "t h w 3"]:
    """Return the frames demonstrations | rollout; without a demonstration video, the rollout alone."""
    frames = result.frames.frames
    if not config.video_path and not len(result.demonstration):
        return frames
    shown = [
        _demonstration(config, path, guide.fps, result.position * (length / len(guide)))
        for path, length in zip(config.video_path, lengths, strict=True)
    ]
    if len(result.demonstration):
        shown.append(iter(result.demonstration.frames))
    both = FrameSpool()
    for ours, *theirs in zip(frames, *shown, strict=False):
        both.append(np.concatenate([*(_fitted(each, ours.shape[0]) for each in theirs), ours], axis=1))
    return both.frames


def _demonstration(
    config: ImitateConfig, path: str, fps: float, positions: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield a demonstration's frame at each control step, then repeat the next one forever."""
    frames = enumerate(video_frames(path, fps, config.max_frames))
    number, frame = next(frames)
    for position in positions:
        while number < int(position):
            number, frame = next(frames)
        yield frame
    _, frame = next(frames, (0, frame))
    while True:
        yield frame


def _fitted(frame: np.ndarray, height: int) -> np.ndarray:
    from PIL import Image

    width = round(frame.shape[1] * height / frame.shape[0] / 2) * 2
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))
