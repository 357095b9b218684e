"""Imitate one demonstration video: `latentact imitate --video-path V --policy-path P ...`.

The output folder holds the guide (`latents.safetensors`, `latents.pt`) and, if a policy acted,
`metrics.json`, the video `imitation.mp4` (demonstration | rollout) and the page `report.html`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
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
from latentact.guidance.edits import blend
from latentact.guidance.extractor import LatentActionExtractor, video_frames
from latentact.guidance.guide import Guide
from latentact.guidance.inference import LatentGuidedInference
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
        if bool(self.video_path) == bool(self.guide):
            given = "both" if self.guide else "neither"
            raise UserError(
                f"exactly one of --video-path and --guide must be given, got {given}. Give the video of a "
                "demonstration, or its guide."
            )
        if (len(self.video_path) > 1) != bool(self.blend):
            raise UserError(
                "--blend must be given if and only if there are several videos, got "
                f"{self.blend or 'none'} for {len(self.video_path)}. Give one weight per --video-path."
            )
        if self.video_path and not self.lam_model_path:
            raise UserError("--lam-model-path must be given, got none. Give the LAM that extracts the guide.")
        if self.mode != "extract_only" and not self.policy_path:
            raise UserError("--policy-path must be given, got none. Give the policy that follows the guide.")
        if self.mode == "robot" and not self.robot_config:
            raise UserError("--robot-config must be given, got none. Give the YAML file of the robot.")
        for name in ("target_fps", "max_frames", "max_steps", "control_time_s", "fps"):
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
    guide, lengths = _guide(config, extractor)
    if config.mode == "extract_only":
        out.mkdir(parents=True, exist_ok=True)
        guide.save(out)
        return _about_guide(config, guide)
    result = _run_on_robot(config, guide, setup, robot) if setup else _simulate(config, guide)
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


def _guide(config: ImitateConfig, extractor: LatentActionExtractor | None) -> tuple[Guide, tuple[int, ...]]:
    """Return the guide, and the number of latent actions of each video."""
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
        "guide": {"source": ", ".join(config.video_path) or config.guide, **guide.about()},
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
    error: BaseException | None = None
    """Error that ended the run early."""


def _simulate(config: ImitateConfig, guide: Guide) -> Result:
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
    env = make_env(name, view=view if view in VIEWS else "agent")
    frames, steps = FrameSpool(), _steps(config, inference)
    try:
        with Progress("following the guide", steps, "steps") as progress:
            (episode,) = run_episodes(
                inference,
                [env],
                [config.seed],
                camera=spec.camera,
                max_steps=steps,
                frames=[frames],
                on_step=lambda: progress.advance(1),
            )
    finally:
        env.close()
    if episode.error is not None and not episode.steps:
        raise episode.error
    metrics = {
        "ended": _ending(episode, len(inference)),
        "success": episode.success,
        "return": episode.total_reward,
        "largest_reward": max(episode.rewards, default=0.0),
        "steps": episode.steps,
        "fps": inference.fps,
    }
    return Result(
        metrics=metrics,
        frames=frames,
        fps=inference.fps,
        position=inference.position,
        error=episode.error,
    )


def _ending(episode: Episode, guide_steps: int) -> str:
    """Return the reason why an episode ended, as text."""
    if episode.end is EpisodeEnd.ENV_ERROR:
        return str(episode.error)
    if episode.end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
        return "the environment ended the episode"
    return ControlEnd.GUIDE_END if episode.steps == guide_steps else ControlEnd.MAX_STEPS


def _run_on_robot(config: ImitateConfig, guide: Guide, setup: RobotSetup, robot: Any) -> Result:
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
    steps = _steps(config, inference)
    log.info("driving %s at %g steps per second", robot.name, inference.fps)
    with Progress("driving the robot", steps, "steps") as progress:

        def on_observation(observation: dict[str, Any]) -> None:
            if camera:
                frames.append(resize(view(observation)[camera][None], config.lam_resolution)[0])
            progress.advance(1)

        try:
            control(
                robot,
                lambda observation: inference.predict_action(view(observation)),
                safety,
                record,
                max_steps=steps,
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
    return Result(
        metrics=metrics,
        frames=frames,
        fps=inference.fps,
        position=inference.position,
        error=error,
    )


def _camera(view: RobotView, cameras: tuple[str, ...], guide: Guide) -> str:
    """Return the image key for the LAM: its own camera, or the policy's first."""
    keys = list(view.cameras.values())
    preferred = [key for key in (guide.spec.camera, *cameras) if key in keys]
    return next(iter(preferred or keys), "")


def _steps(config: ImitateConfig, inference: LatentGuidedInference) -> int:
    """Return the number of control steps: the minimum of guide, maximum steps and time limit."""
    limits = [len(inference), config.max_steps, int(config.control_time_s * inference.fps + 1e-6)]
    if config.control_time_s and not limits[2]:
        raise UserError(
            f"--control-time-s must be at least one step of {1 / inference.fps:g} s, got "
            f"{config.control_time_s:g}. Increase it."
        )
    return min(limit for limit in limits if limit)


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
    if not config.video_path:
        return frames
    shown = [
        _demonstration(config, path, guide.fps, result.position * (length / len(guide)))
        for path, length in zip(config.video_path, lengths, strict=True)
    ]
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
