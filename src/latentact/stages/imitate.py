"""Imitate one demonstration video, or a live camera: `latentact imitate --video-path V --policy-path P ...`.

The output folder holds the guide (`latents.safetensors`, `latents.pt`) and, if a policy acted,
`metrics.json`, the video `imitation.mp4` (demonstration | rollout) and the page `report.html`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import UInt8

from latentact.config import Limit, OneOf, Pixels, Rate, Seconds, Seed
from latentact.device import require_device
from latentact.envs.checks import check_ranges
from latentact.envs.spec import ENVS, env_spec
from latentact.errors import UserError, require_one_of
from latentact.guidance.align import TIME_BASES, latent_agreement
from latentact.guidance.capture import Capture, open_source
from latentact.guidance.edits import blend
from latentact.guidance.extractor import LatentActionExtractor, video_frames
from latentact.guidance.follow import FollowedGuide, FrameSpool, follow_in_env, follow_on_robot
from latentact.guidance.guide import Guide
from latentact.guidance.inference import GuidedActor, LatentGuidedInference
from latentact.guidance.live import LiveInference, blank_guide
from latentact.io.atomic import write_json
from latentact.io.video_writer import write_video
from latentact.reporting.pages.imitate import write_page
from latentact.robots.setup import RobotSetup, make_robot

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
    extra_steps: Limit = 0
    """Actions after the end of the guide, without it; for a policy that learned to act without a guide."""
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
                f"the demonstration must be exactly one of --video-path, --guide and --live, got {given}. "
                "Give a video, its guide, or a camera."
            )
        if (len(self.video_path) > 1) != bool(self.blend):
            raise UserError(
                "--blend must be one weight for each of several --video-path, got "
                f"{self.blend or 'none'} for {len(self.video_path)}. Leave it out for a single video."
            )
        if not self.guide and not self.lam_model_path:
            raise UserError(
                "--lam-model-path must be the LAM that extracts the guide, got none. Give a folder or hub id."
            )
        if self.mode != "extract_only" and not self.policy_path:
            raise UserError(
                "--policy-path must be a policy that follows the guide, got none. Give its folder or hub id."
            )
        if self.mode == "robot" and not self.robot_config:
            raise UserError(
                "--robot-config must be the YAML file of the robot, got none. Give it, or --mode simulation."
            )
        if self.live and (self.mode == "extract_only" or self.time_base != "hold"):
            raise UserError(
                "--live must have --mode simulation or robot and --time-base hold, got "
                f"{self.mode} and {self.time_base}. For other modes, record a video."
            )
        if self.max_age and not self.live:
            raise UserError(f"--max-age must be 0 without --live, got {self.max_age:g}. Leave it out.")
        if self.extra_steps and self.live:
            raise UserError(f"--extra-steps must be 0 with --live, got {self.extra_steps}. Leave it out.")
        for name in ("target_fps", "max_frames", "max_steps", "control_time_s", "fps", "max_age"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} must be at least 0 and finite, got {getattr(self, name)}. Use 0 for the default."
                )
        check_ranges(seed=self.seed, max_steps=self.max_steps, extra_steps=self.extra_steps)


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
    robot: Any = make_robot(setup.robot) if setup else None
    extractor = None
    if config.lam_model_path:
        extractor = LatentActionExtractor(config.lam_model_path, config.lam_resolution, config.device)
    with _capture(config, extractor) as capture:
        guide, lengths = _guide(config, extractor, capture)
        if config.mode == "extract_only":
            out.mkdir(parents=True, exist_ok=True)
            guide.save(out)
            return _about_guide(config, guide)

        actor = _actor(config, guide, extractor, capture)
        max_steps, source = _max_steps(config, actor), config.policy_path
        if setup:
            result = follow_on_robot(
                actor,
                setup,
                robot,
                lam_camera=guide.spec.camera,
                resolution=config.lam_resolution,
                max_steps=max_steps,
                source=source,
            )
        else:
            result = follow_in_env(
                actor, config.env_name, seed=config.seed, max_steps=max_steps, source=source
            )
    if result.guide is None:  # a camera that was lost before it showed anything
        raise result.error or UserError(
            f"{config.live} must have at least one latent action, got none. Record a longer demonstration."
        )
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
def _capture(config: ImitateConfig, extractor: LatentActionExtractor | None) -> Generator[Capture | None]:
    """Open the live camera, and close it after the block; None without one."""
    if not config.live or extractor is None:
        yield None
        return
    capture = Capture(open_source(config.live, extractor, config.target_fps), config.max_frames)
    with contextlib.closing(capture):
        limited = config.max_frames or config.max_steps or config.control_time_s or config.mode == "robot"
        if capture.source.endless and not limited:
            raise UserError(
                "a camera in simulation must have a limit, got none. Set --max-steps, --control-time-s or "
                "--max-frames."
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


def _actor(
    config: ImitateConfig, guide: Guide, extractor: LatentActionExtractor | None, capture: Capture | None
) -> GuidedActor:
    """Return the policy that follows the guide, or the camera."""
    fps = config.fps
    if config.mode == "simulation":
        fps = float(fps or env_spec(config.env_name).fps)
    inference = LatentGuidedInference(
        config.policy_path, guide, fps=fps, time_base=config.time_base, device=config.device,
        extra_steps=config.extra_steps,
    )  # fmt: skip
    if capture is None or extractor is None:
        return inference
    return LiveInference(inference, extractor, capture, config.max_age)


def _about_guide(config: ImitateConfig, guide: Guide) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "guide": {"source": ", ".join(config.video_path) or config.guide or config.live, **guide.about()},
    }


def _max_steps(config: ImitateConfig, actor: GuidedActor) -> int:
    """Return the number of control steps: the minimum of guide, maximum steps and time limit; 0: no limit."""
    limits = [actor.control_steps, config.max_steps, int(config.control_time_s * actor.fps + 1e-6)]
    if config.control_time_s and not limits[2]:
        raise UserError(
            f"--control-time-s must be at least one step of {1 / actor.fps:g} s, got "
            f"{config.control_time_s:g}. Increase it."
        )
    return min((limit for limit in limits if limit), default=0)


def _agreement(guide: Guide, extractor: LatentActionExtractor, result: FollowedGuide) -> dict[str, Any]:
    """Compare the latent actions of the run with the guide; if that is impossible, `why` gives the reason."""
    try:
        achieved = extractor.extract_from_frames(result.frames.frames, result.fps)
    except UserError as error:
        return {"measure": None, "why": str(error)}
    return latent_agreement(guide, achieved, result.position)


def _compose(
    config: ImitateConfig, guide: Guide, lengths: tuple[int, ...], result: FollowedGuide
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
