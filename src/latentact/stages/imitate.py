"""Let one demonstration video guide a policy: `latentact imitate --video-path V --policy-path P ...`.

The folder gets the guide (`latents.safetensors`, `latents.pt`) and, where a policy acted, `metrics.json`, the
video `imitation.mp4` (demonstration beside rollout) and the page `report.html`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from latentact.data.decode.resize import resize
from latentact.device import require_device
from latentact.envs.checks import check_compatible, check_ranges
from latentact.envs.spec import VIEWS, EnvError, EnvSpec, env_spec, make_env
from latentact.errors import UserError, did_you_mean
from latentact.guidance.align import agreement
from latentact.guidance.extractor import LatentActionExtractor, video_frames
from latentact.guidance.guide import Guide
from latentact.guidance.inference import LatentGuidedInference
from latentact.io.atomic import write_json
from latentact.io.video_writer import write_video
from latentact.progress import Progress
from latentact.reporting.pages.imitate import write_page
from latentact.robots.control import ControlLog, control
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
    """One video guides a policy, in simulation or on a robot."""

    output_dir: str
    """Folder for what comes out; an older result there is replaced."""
    video_path: str = ""
    """The demonstration."""
    latents_path: str = ""
    """Its latent actions, as an earlier run wrote them, instead of the video."""
    policy_path: str = ""
    """Folder or hub id of a policy that follows latent actions."""
    lam_model_path: str = ""
    """Folder or hub id of the LAM that the policy was trained with."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    target_fps: float = 0.0
    """Frames per second at which the video is read; 0: the LAM's."""
    max_frames: int = 0
    """Frames of the video that are read at most; 0: all."""
    lam_resolution: int = 224
    """Height and width to which frames are resized before the LAM; 0: as they are."""
    mode: str = "simulation"
    """extract_only, simulation or robot."""
    env_name: str = "PushT-v0"
    """simulation: PushT-v0, babyai/LEVEL, or any Gymnasium id, also PACKAGE:ID and PACKAGE/NAME. Its own time
    limit is not needed, since the guide ends."""
    seed: int = 0
    """simulation: reset seed of the environment."""
    robot_config: str = ""
    """robot: YAML file that names the robot, its limits and its cameras."""
    max_steps: int = 0
    """Actions after which it ends; 0: only when the guide is over."""
    control_time_s: float = 0.0
    """Seconds of control after which it ends; 0: only when the guide is over."""
    fps: float = 0.0
    """Control steps per second; 0: the environment's, on a robot the policy's, or else the guide's."""
    time_base: str = "hold"
    """How the guide follows control of another rate: hold each latent action, or resample in time."""
    render: bool = True
    """Whether pictures of what happened are kept for people."""
    save_video: bool = True
    """Whether the video is written."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}{did_you_mean(self.mode, MODES)}")
        if bool(self.video_path) == bool(self.latents_path):
            raise UserError("give either --video-path of the demonstration or --latents-path of its latents.")
        if self.video_path and not self.lam_model_path:
            raise UserError("give --lam-model-path, which turns the video into latent actions.")
        if self.mode != "extract_only" and not self.policy_path:
            raise UserError("give --policy-path of the policy that is to follow the guide.")
        if self.mode == "robot" and not self.robot_config:
            raise UserError("give --robot-config, the YAML file of the robot.")
        for name in ("target_fps", "max_frames", "max_steps", "control_time_s", "fps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; wanted at least 0.")
        check_ranges(seed=self.seed, max_steps=self.max_steps)


def run(config: ImitateConfig) -> dict[str, Any]:
    """Extract the guide and let the policy follow it; returns what `metrics.json` holds."""
    require_device(config.device)
    out = Path(config.output_dir)
    setup = RobotSetup.read(config.robot_config) if config.mode == "robot" else None
    robot = make_robot(setup.robot) if setup else None
    extractor = None
    if config.lam_model_path:
        extractor = LatentActionExtractor(config.lam_model_path, config.lam_resolution, config.device)
    guide = _guide(config, extractor)
    if config.mode == "extract_only":
        out.mkdir(parents=True, exist_ok=True)
        guide.save(out)
        return _about_guide(config, guide)
    result = _drive(config, guide, setup, robot) if setup else _simulate(config, guide)
    out.mkdir(parents=True, exist_ok=True)
    for old in (METRICS, PAGE, VIDEO):
        (out / old).unlink(missing_ok=True)
    guide.save(out)
    metrics = {**_about_guide(config, guide), **result.metrics, "agreement": None}
    if isinstance(result.error, (KeyboardInterrupt, SystemExit)):
        write_json(out / METRICS, metrics)
        raise result.error
    if extractor is not None and len(result.film):
        metrics["agreement"] = _agreement(guide, extractor, result)
    film = _compose(config, guide, result) if config.render and len(result.film) else None
    if film is not None and config.save_video:
        write_video(out / VIDEO, film, result.fps)
    write_json(out / METRICS, metrics)
    stills = None if film is None else film[np.linspace(0, len(film) - 1, STILLS).astype(int)]
    write_page(out / PAGE, metrics, stills, out / VIDEO if (out / VIDEO).exists() else None)
    if result.error is not None:
        raise result.error
    log.info("%s: %s", out, metrics["ended"])
    return metrics


def _guide(config: ImitateConfig, extractor: LatentActionExtractor | None) -> Guide:
    if config.video_path:
        assert extractor is not None
        return extractor.extract(config.video_path, config.target_fps, config.max_frames)
    guide = Guide.load(config.latents_path)
    if extractor is not None and extractor.model.spec.weights != guide.spec.weights:
        raise UserError(
            f"{config.latents_path} was extracted by a LAM of other weights than {config.lam_model_path}; "
            "give the LAM that extracted it, or extract again."
        )
    return guide


def _about_guide(config: ImitateConfig, guide: Guide) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "guide": {
            "source": config.video_path or config.latents_path,
            "latent_actions": len(guide),
            "fps": guide.fps,
            "seconds": len(guide) / guide.fps if guide.fps else None,
            "spec": asdict(guide.spec),
        },
    }


class FrameSpool:
    """Pictures of a run, in a file that vanishes with it, so that a long run does not fill the memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the film)
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def append(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add a picture of the size of those before."""
        self._shape, self._count = frame.shape, self._count + 1
        self._file.write(frame.tobytes())

    def __len__(self) -> int:
        """Number of pictures."""
        return self._count

    @property
    def frames(self) -> UInt8[np.ndarray, "t h w 3"]:
        """All pictures, memory-mapped."""
        self._file.flush()
        return np.memmap(self._file, np.uint8, "r+", shape=(self._count, *self._shape))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What happened."""

    metrics: dict[str, Any]
    """Numbers."""
    film: FrameSpool
    """What the LAM's camera saw before each action and, where it goes on, after the last."""
    fps: float
    """Control steps per second."""
    position: np.ndarray
    """Where in the guide each step was."""
    error: BaseException | None = None
    """Why it ended before its time."""


def _simulate(config: ImitateConfig, guide: Guide) -> Result:
    name = config.env_name
    spec = env_spec(name)
    inference = LatentGuidedInference(
        config.policy_path,
        guide,
        fps=float(config.fps or spec.fps),
        time_base=config.time_base,
        device=config.device,
    )
    camera = next(iter(inference.policy.cameras), "")
    view = camera.rpartition(".")[2]
    view = view if view in VIEWS else "agent"
    spec = env_spec(name, view=view)
    policy = inference.policy
    check_compatible(
        spec,
        config.policy_path,
        actions=policy.actions,
        cameras=policy.cameras,
        state_size=policy.state_size,
    )
    env = make_env(name, view=view)
    try:
        film = FrameSpool()
        metrics, error = _play(inference, env, spec, film, config.seed, _steps(config, inference))
    finally:
        env.close()
    return Result(metrics=metrics, film=film, fps=inference.fps, position=inference.position, error=error)


def _play(
    inference: LatentGuidedInference, env: Any, spec: EnvSpec, film: FrameSpool, seed: int, max_steps: int
) -> tuple[dict[str, Any], EnvError | None]:
    """Let a policy follow its guide in an environment from a reset seed; returns metrics, and why it failed.

    Raises:
        UserError: an action is not finite, or the environment fails before its first step.
    """
    observation, info = env.reset(seed=seed)
    inference.reset()
    task, success, rewards, ended, error = info["task"], None, [], "the guide is over", None
    film.append(observation["pixels"])
    with Progress("following the guide", max_steps, "steps") as progress:
        while len(rewards) < max_steps:
            seen = {spec.camera: observation["pixels"], "task": task}
            if "agent_pos" in observation:
                seen["observation.state"] = observation["agent_pos"]
            action = inference.predict_action(seen)
            if action is None:
                break
            try:
                observation, reward, terminated, truncated, info = env.step(action)
            except EnvError as failed:
                if not rewards:
                    raise
                ended, error = str(failed), failed
                break
            rewards.append(reward)
            film.append(observation["pixels"])
            progress.advance(1)
            if "is_success" in info:
                success = bool(success or info["is_success"])
            if terminated or truncated:
                ended = "the environment ended the episode"
                break
    if ended == "the guide is over" and len(rewards) < len(inference):
        ended = "the last step was taken"
    metrics = {
        "ended": ended,
        "success": success,
        "return": sum(rewards),
        "largest_reward": max(rewards, default=0.0),
        "steps": len(rewards),
        "fps": inference.fps,
    }
    return metrics, error


def _drive(config: ImitateConfig, guide: Guide, setup: RobotSetup, robot: Any) -> Result:
    inference = LatentGuidedInference(
        config.policy_path, guide, fps=config.fps, time_base=config.time_base, device=config.device
    )
    policy = inference.policy
    view = RobotView(robot, setup.cameras)
    if policy.actions.discrete:
        raise UserError(f"{config.policy_path} acts by {policy.actions} and a robot takes numbers.")
    view.refuse_unless_fits(
        cameras=policy.cameras, state_size=policy.state_size, action_size=policy.actions.size
    )
    safety, record, film = Safety(view.joints, setup.safety), ControlLog(fps=inference.fps), FrameSpool()
    if safety.unlimited:
        log.warning("no safety.limits for %s: the policy alone decides", ", ".join(safety.unlimited))
    camera = _camera(view, policy.cameras, guide)
    inference.predict_action(view(view.blank()))  # the first call is slow, and fails where the two do not fit
    inference.reset()
    error: BaseException | None = None
    steps = _steps(config, inference)
    log.info("driving %s at %g steps per second", robot.name, inference.fps)
    with Progress("driving the robot", steps, "steps") as progress:

        def watch(observation: dict[str, Any]) -> None:
            if camera:
                film.append(resize(view(observation)[camera][None], config.lam_resolution)[0])
            progress.advance(1)

        try:
            control(
                robot,
                lambda seen: inference.predict_action(view(seen)),
                safety,
                record,
                max_steps=steps,
                watch=watch,
            )
        except (UserError, KeyboardInterrupt, SystemExit) as stopped:
            error = stopped
    metrics = vars(record) | {
        "holds": dict(record.holds),
        "robot": setup.robot,
        "refused": dict(safety.refused),
        "clipped": dict(safety.clipped),
        "without_limits": safety.unlimited,
    }
    return Result(metrics=metrics, film=film, fps=inference.fps, position=inference.position, error=error)


def _camera(view: RobotView, cameras: tuple[str, ...], guide: Guide) -> str:
    """Return the key of the picture that the LAM is shown: its own camera, or the policy's first."""
    keys = list(view.pictures.values())
    wanted = [key for key in (guide.spec.camera, *cameras) if key in keys]
    return next(iter(wanted or keys), "")


def _steps(config: ImitateConfig, inference: LatentGuidedInference) -> int:
    """Control steps until the guide, the steps or the time are over."""
    limits = [len(inference), config.max_steps, int(config.control_time_s * inference.fps + 1e-6)]
    if config.control_time_s and not limits[2]:
        raise UserError(f"--control-time-s {config.control_time_s:g} is less than a step; give more.")
    return min(limit for limit in limits if limit)


def _agreement(guide: Guide, extractor: LatentActionExtractor, result: Result) -> dict[str, Any]:
    """Compare what happened with the guide, or say why that cannot be."""
    try:
        happened = extractor.extract_from_frames(result.film.frames, result.fps)
    except UserError as error:
        return {"measure": None, "why": str(error)}
    return agreement(guide, happened, result.position)


def _compose(config: ImitateConfig, guide: Guide, result: Result) -> UInt8[np.ndarray, "t h w 3"]:
    """Return demonstration | rollout; the rollout alone where there is no video of the demonstration."""
    frames = result.film.frames
    if not config.video_path:
        return frames
    both = FrameSpool()
    for ours, theirs in zip(frames, _demonstration(config, guide, result), strict=False):
        both.append(np.concatenate([_fitted(theirs, ours.shape[0]), ours], axis=1))
    return both.frames


def _demonstration(config: ImitateConfig, guide: Guide, result: Result) -> Iterator[np.ndarray]:
    """Yield the demonstration's frame at each control step, and its last one ever after."""
    frames = enumerate(video_frames(config.video_path, guide.fps, config.max_frames))
    number, frame = next(frames)
    for position in result.position:
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
