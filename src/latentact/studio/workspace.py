"""The studio's workspace, shared by all users and read-only, and the demonstration of one user, a `Take`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from latentact.config import from_dict
from latentact.data.mixture import TrainingDataConfig
from latentact.data.store import FrameStore
from latentact.envs.spec import VIEWS, EnvSpec, env_spec
from latentact.errors import UserError
from latentact.guidance.extractor import LatentActionExtractor
from latentact.guidance.guide import Guide
from latentact.io.atomic import read_object
from latentact.io.records import read_yaml
from latentact.lams.contract import LatentActionModel

LONGEST = 600
"""Frames of a demonstration that are shown; the rest of a longer one is cut."""
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class WorkProgress:
    """How far a long computation is."""

    what: str
    done: int
    total: int
    """0: unknown."""


type Work[T] = Generator[WorkProgress, None, T]
"""A computation that reports progress, and stops where it is closed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workspace:
    """A LAM, and with it data, a policy and an environment, each if there is one."""

    lam: LatentActionExtractor
    """The LAM; frames are resized to its own resolution."""
    name: str
    """What the user gave."""
    store: FrameStore | None
    policy: str
    """Folder of a policy that follows guides; empty: none."""
    env: str
    """Name of an environment; empty: none."""
    view: str
    """View of the environment that the LAM's camera shows."""
    out: Path
    """Folder of saved guides, videos and labels."""
    live: str = ""
    """Camera of the page Live; empty: none."""

    @property
    def model(self) -> LatentActionModel:
        """The latent action model."""
        return self.lam.model

    def gap(self, fps: float) -> int:
        """Return the LAM's gap in frames of a demonstration."""
        return self.lam.gap(fps)

    def env_spec(self) -> EnvSpec:
        """Return the specification of the environment."""
        return env_spec(self.env, view=self.view)

    def episode(self, number: int) -> Take:
        """Return an episode of the data.

        Raises:
            UserError: there is no such episode, or it is too short for the LAM.
        """
        if self.store is None or not 0 <= number < self.store.num_episodes:
            count = self.store.num_episodes if self.store else 0
            raise UserError(f"the episode must be one of {count}, got {number}. Choose another.")
        store, start = self.store, int(self.store.starts[number])
        rows = np.arange(start, start + min(int(store.lengths[number]), LONGEST))
        frames = np.array(store.frames[rows])
        states = None if store.state is None else store.state[rows]
        used = states if self.model.state_size else None
        guide = self.lam.extract_from_frames(frames, store.fps, used)
        labels = None if store.action_space is None else store.actions([number])[rows]
        return Take(
            name=store.episode_ids[number],
            frames=frames,
            fps=store.fps,
            guide=guide,
            states=states,
            labels=labels,
            episode=number,
        )

    def video(self, path: Path, name: str) -> Take:
        """Return a video file, at the LAM's frame rate.

        Raises:
            UserError: it is no video, damaged, or too short or slow for the LAM; the message has its `name`.
        """
        try:
            frames = self.lam.load_video(path, max_frames=LONGEST)
            fps = self.lam.loaded_fps or self.lam.video_fps(path, None)
            guide = self.lam.extract_from_frames(frames, fps)
        except UserError as error:
            raise UserError(str(error).replace(str(path), name)) from error
        return Take(name=name, frames=frames, fps=fps, guide=guide)


@dataclass(frozen=True, kw_only=True, eq=False)
class Take:
    """One demonstration and its latent actions."""

    name: str
    frames: UInt8[np.ndarray, "t h w 3"]
    fps: float
    guide: Guide
    """Entry i is the transition from frame i to frame i + gap."""
    states: Float32[np.ndarray, "t s"] | None = None
    labels: np.ma.MaskedArray | None = None
    """Recorded robot actions, if there are any."""
    episode: int | None = None
    """Number of the episode in the data; None for a video."""


def past_frames(
    model: LatentActionModel, frames: UInt8[np.ndarray, "t h w 3"], steps: Int64[np.ndarray, " b"], gap: int
) -> UInt8[torch.Tensor, "b c 3 h w"]:
    """Return the input of forward dynamics at steps of a video: context and current frame, a gap apart."""
    window = np.maximum(steps[:, None] + np.arange(-model.context, 1) * gap, 0)
    return torch.from_numpy(frames[window]).permute(0, 1, 4, 2, 3)


def require_predictions(model: LatentActionModel) -> None:
    """Raise a UserError unless the LAM predicts frames."""
    if not model.generative:
        raise UserError(
            f"the LAM {model.spec.model} must predict frames for this, got one that predicts features. "
            "Use a LAM trained with lam.target.kind=pixels."
        )


@torch.inference_mode()
def predict(
    model: LatentActionModel, past: UInt8[torch.Tensor, "b c 3 h w"], vectors: Float32[np.ndarray, "b k d"]
) -> UInt8[np.ndarray, "b h2 w2 3"]:
    """Return the frames that forward dynamics predicts."""
    device = next(model.parameters()).device
    found = model.predict(past.to(device), torch.tensor(vectors).to(device))
    return found.permute(0, 2, 3, 1).numpy(force=True)


def predict_next(work: Workspace, take: Take) -> Work[UInt8[np.ndarray, "n h w 3"]]:
    """Predict the frame after each transition of a demonstration from its own latent action."""
    require_predictions(work.model)
    gap, found = work.gap(take.fps), []
    for i in range(0, len(take.guide), BATCH):
        steps = np.arange(i, min(i + BATCH, len(take.guide)))
        past = past_frames(work.model, take.frames, steps, gap)
        found.append(predict(work.model, past, take.guide.vectors[steps]))
        yield WorkProgress(what="predicting frames", done=int(steps[-1]) + 1, total=len(take.guide))
    return np.concatenate(found)


def imagine(work: Workspace, first: UInt8[np.ndarray, "h w 3"], guide: Guide) -> Work[np.ndarray]:
    """Predict a whole video from its first frame and a guide, each frame from the predicted ones.

    Returns:
        uint8 `[n + 1, h, w, 3]`, one frame per latent action after the first; within a frame gap the same
        frame is repeated.
    """
    require_predictions(work.model)
    gap, now = work.gap(guide.fps), work.lam.resized(first)
    past, shown = [now] * (work.model.context + 1), [now]
    for step in range(0, len(guide), gap):
        window = torch.from_numpy(np.stack(past)).permute(0, 3, 1, 2)[None]
        now = work.lam.resized(predict(work.model, window, guide.vectors[step : step + 1])[0])
        past = [*past[1:], now]
        shown += [now] * min(gap, len(guide) - step)
        yield WorkProgress(what="imagining", done=step + 1, total=len(guide))
    return np.stack(shown)


class _StoppedError(BaseException):
    """Ends the thread of a computation that was closed."""


def in_thread[T](what: str, total: int, function: Callable[[Callable[[], None]], T]) -> Work[T]:
    """Run a function in a thread of its own and yield its progress; closed, it stops at its next step.

    Args:
        what: activity.
        total: number of steps; 0: unknown.
        function: called with a function that it calls after each step.
    """
    news: queue.Queue[Any] = queue.Queue()
    closed = threading.Event()

    def step() -> None:
        if closed.is_set():
            raise _StoppedError
        news.put(None)

    def target() -> None:
        try:
            news.put((function(step), None))
        except BaseException as error:  # raised again in the caller's thread
            news.put((None, error))

    done = 0
    threading.Thread(target=target, daemon=True).start()
    try:
        while (item := news.get()) is None:
            done += 1
            yield WorkProgress(what=what, done=done, total=total)
    finally:
        closed.set()
    result, error = item
    if error is not None:
        raise error
    return result


def find_lam(run: str) -> str:
    """Return the LAM of a run folder: itself, or the first below it that learned from video alone."""
    folder = Path(run)
    if not folder.is_dir() or (folder / "config.json").exists():
        return run
    below = sorted(folder.rglob("lam/spec.json"))
    if not below:
        return run  # a published model, or `load_lam` reports what is missing
    own = [file for file in below if not read_object(file).get("robot_actions")]
    return str((own or below)[0].parent)


def find_policy(run: str, lam: str) -> str:
    """Return a policy below a run folder that follows latent actions of its LAM; empty: none."""
    folder = Path(run)
    if not folder.is_dir() or Path(lam) == folder:
        return ""
    weights = read_object(Path(lam) / "spec.json").get("weights")
    for file in sorted(folder.rglob("spec.json")):
        if file.parent.name in ("grounded", "guided") and read_object(file).get("weights") == weights:
            return str(file.parent)
    return ""


def training_data(run: str, lam: str, data: str) -> tuple[TrainingDataConfig | None, str]:
    """Return the data to show, and where it should be: that of the flag, or else of the LAM's training."""
    if data:
        return TrainingDataConfig(path=data), data
    file = Path(lam) / "config.yaml"
    values = read_yaml(file) if file.is_file() else None
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        return None, ""
    config = from_dict(TrainingDataConfig, values["data"])
    if config.mixture and all(Path(part.path).exists() for part in config.mixture):
        return config, ", ".join(part.path for part in config.mixture)
    for path in (config.path, str(Path(run) / "data")):
        if path and Path(path).exists():
            return TrainingDataConfig(path=path, camera=config.camera, target_fps=config.target_fps), path
    return None, config.path


def find_env(run: str) -> str:
    """Return the environment that a run compared policies in; empty: none."""
    for file in (Path(run) / "config.yaml", Path(run) / "compare" / "config.yaml"):
        values = read_yaml(file) if file.is_file() else None
        if isinstance(values, dict) and isinstance(values.get("env"), str):
            return values["env"]
    return ""


def matching_view(env: str, camera: str) -> str:
    """Return the view of an environment whose camera is the LAM's, or else the first."""
    return next((view for view in VIEWS if env_spec(env, view=view).camera == camera), VIEWS[0])
