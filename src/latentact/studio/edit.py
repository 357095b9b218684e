"""The page Edit: operations on a demonstration's guide, its preview by forward dynamics, and a rollout."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from latentact.envs.episode import run_episodes
from latentact.envs.spec import make_env
from latentact.errors import UserError
from latentact.guidance.guide import SUFFIX, Guide
from latentact.guidance.inference import LatentGuidedInference
from latentact.io.video_writer import write_video
from latentact.studio.images import sheet
from latentact.studio.look import rows_of
from latentact.studio.meaning import Survey
from latentact.studio.workspace import LONGEST, Take, Work, Workspace, in_thread

OPERATIONS = {
    "slice": "Keep the selected steps",
    "replace": "Replace the selected steps with another guide",
    "scale": "Scale the difference to no change by the factor (0: no change)",
    "set code": "Set the code of the selected steps (0, or 0 3 1 2 for several tokens)",
    "time warp": "Play at the factor's speed (2: half the steps)",
    "smooth": "Average over an odd number of steps",
    "interpolate": "Go from this guide (0) to another (1)",
    "blend": "Weighted mean with another guide, aligned in time (0: this, 1: the other)",
    "concat": "Append another guide after a transition of some steps",
}
"""Operation -> what it does."""
SELECTION = ("slice", "replace", "set code")
OTHER = ("replace", "interpolate", "blend", "concat")
DEFAULT = {"scale": 0.5, "time warp": 2, "smooth": 5, "interpolate": 0.5, "blend": 0.5, "concat": 10}
"""Operation with a number -> its default."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,59}")


@dataclass(frozen=True, kw_only=True, eq=False)
class GuideDraft:
    """A demonstration, the versions of its guide, and what was seen of the current one."""

    take: Take
    versions: tuple[Guide, ...]
    current: int = 0
    """Index of the current version; later ones can be redone."""
    imagined: UInt8[np.ndarray, "t h w 3"] | None = None
    rollout: GuidedRollout | None = None

    @property
    def guide(self) -> Guide:
        """The current version."""
        return self.versions[self.current]

    def edited(self, guide: Guide) -> GuideDraft:
        """Return the draft with a new version after the current one."""
        if len(guide) > 2 * LONGEST:
            raise UserError(
                f"a guide must have at most {2 * LONGEST} steps in the studio, got {len(guide)}. Use "
                "latentact guide for longer ones."
            )
        kept = self.versions[: self.current + 1]
        return replace(self, versions=(*kept, guide), current=len(kept), imagined=None, rollout=None)

    def moved(self, by: int) -> GuideDraft:
        """Return the draft at an earlier (-1) or later (1) version, if there is one."""
        to = min(max(self.current + by, 0), len(self.versions) - 1)
        return replace(self, current=to, imagined=None, rollout=None)


def draft(take: Take) -> GuideDraft:
    """Return the unedited draft of a demonstration."""
    return GuideDraft(take=take, versions=(take.guide,))


def apply(guide: Guide, operation: str, steps: range, number: float, code: str, other: Guide | None) -> Guide:
    """Return the guide after an operation.

    Args:
        guide: the guide.
        operation: one of `OPERATIONS`.
        steps: for those in `SELECTION`.
        number: factor, speed, window, fraction or steps.
        code: codes separated by spaces or commas.
        other: for those in `OTHER`.

    Raises:
        UserError: the operation is unknown or does not fit.
    """
    if operation not in OPERATIONS:
        raise UserError(f"the operation must be one of {', '.join(OPERATIONS)}, got {operation!r}.")
    if operation in OTHER and other is None:
        raise UserError(f"{operation} needs another guide, got none. Choose one.")
    if not np.isfinite(number):
        raise UserError(f"the number must be finite, got {number}.")
    if operation == "slice":
        return guide.slice(steps.start, steps.stop)
    if operation == "scale":
        return guide.scale(number)
    if operation == "time warp":
        return guide.time_warp(number)
    if operation == "smooth":
        return guide.smooth(_whole(number))
    if operation == "set code":
        found = code.replace(",", " ").split()
        if not found or not all(each.isascii() and each.isdigit() and len(each) < 10 for each in found):
            raise UserError(f"the code must be whole numbers such as 0 or 0 3 1 2, got {code!r}.")
        codes = [int(each) for each in found]
        return guide.set_code(steps, codes[0] if len(codes) == 1 else codes)
    assert other is not None
    if operation == "replace":
        return guide.replace(steps, other)
    if operation == "interpolate":
        return guide.interpolate(other, number)
    if operation == "concat":
        return guide.concat(other, _whole(number))
    if not 0 <= number <= 1:
        raise UserError(f"the weight of the other guide must be between 0 and 1, got {number:g}.")
    return Guide.blend([guide, other], [1 - number, number])


def _whole(number: float) -> int:
    if number != round(number):
        raise UserError(f"the number must be whole for this operation, got {number:g}.")
    return int(number)


def page(drawn: GuideDraft, found: Survey, selected: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return the data of the page."""
    films: list[tuple[str, dict[str, Any]]] = [("demonstration", sheet(drawn.take.frames))]
    if drawn.imagined is not None:
        films.append(("guide, imagined", sheet(drawn.imagined)))
    if drawn.rollout is not None:
        films.append(("rollout of the policy", sheet(drawn.rollout.frames)))
    return rows_of(drawn.guide, found) | {
        "films": films,
        "fps": drawn.take.fps,
        "before": rows_of(drawn.take.guide, found),
        "range": selected,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class GuidedRollout:
    """A policy that followed a guide."""

    frames: UInt8[np.ndarray, "t h w 3"]
    fps: float
    position: Float[np.ndarray, " t"]
    """Position in the guide of each frame."""
    success: bool | None
    largest_reward: float

    def summary(self) -> str:
        """Return the outcome in one sentence."""
        done = {True: "success", False: "no success", None: "success is not reported"}[self.success]
        return f"{len(self.frames) - 1} steps, {done}, largest reward {self.largest_reward:.2f}."


def follow(work: Workspace, guide: Guide, seed: int) -> Work[GuidedRollout]:
    """Roll out the policy with a guide in the environment.

    Raises:
        UserError: there is no policy or environment, they do not match, or the environment fails.
    """
    if not work.policy or not work.env:
        missing = "policy" if not work.policy else "environment"
        raise UserError(f"a rollout needs a policy and an environment, got no {missing}. Give --{missing}.")
    if not 0 <= seed < 2**31:
        raise UserError(f"the seed must be between 0 and {2**31 - 1}, got {seed}.")
    spec = work.env_spec()
    inference = LatentGuidedInference(work.policy, guide, fps=float(spec.fps), device=work.lam.device)
    inference.agent.spec.check_env(spec, work.policy)

    def run(step: Callable[[], None]) -> GuidedRollout:
        frames: list[np.ndarray] = []
        env = make_env(work.env, view=work.view)
        try:
            (episode,) = run_episodes(
                inference,
                [env],
                [seed],
                camera=spec.camera,
                max_steps=len(inference),
                frames=[frames],
                on_step=step,
            )
        finally:
            env.close()
        if episode.error is not None:
            raise episode.error
        position = inference.position[np.minimum(np.arange(len(frames)), len(inference) - 1)]
        return GuidedRollout(
            frames=np.stack([work.lam.resized(frame) for frame in frames]),
            fps=float(spec.fps),
            position=position,
            success=episode.success,
            largest_reward=max(episode.rewards, default=0.0),
        )

    return (yield from in_thread("following the guide", len(inference), run))


def guides_folder(work: Workspace) -> Path:
    """Return the folder of saved guides."""
    return work.out / "guides"


def saved(work: Workspace) -> list[str]:
    """Return the names of saved guides."""
    return sorted(path.stem for path in guides_folder(work).glob(f"*{SUFFIX}") if NAME.fullmatch(path.stem))


def load(work: Workspace, name: str) -> Guide:
    """Return a saved guide.

    Raises:
        UserError: there is none of that name, it is damaged, or it is a link out of the folder.
    """
    path = guides_folder(work) / f"{name}{SUFFIX}"
    if name not in saved(work) or not path.resolve().is_relative_to(guides_folder(work).resolve()):
        raise UserError(f"there is no saved guide {name!r}. Choose one of the list.")
    return Guide.load(path)


def save(work: Workspace, drawn: GuideDraft, name: str) -> list[Path]:
    """Save the guide and, if there is a preview or a rollout, their video beside the demonstration.

    Raises:
        UserError: the name is no plain file name.
    """
    if not NAME.fullmatch(name or ""):
        raise UserError(
            f"the name must be 1 to 60 letters, digits, spaces, - and _, got {name!r}. Choose another."
        )
    files = [guides_folder(work) / f"{name}{SUFFIX}"]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    drawn.guide.save(files[0])
    if drawn.imagined is not None or drawn.rollout is not None:
        files.append(work.out / "videos" / f"{name}.mp4")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        write_video(files[-1], side_by_side(drawn), drawn.rollout.fps if drawn.rollout else drawn.take.fps)
    return files


def side_by_side(drawn: GuideDraft) -> UInt8[np.ndarray, "t h w2 3"]:
    """Return demonstration | imagined | rollout, as far as they exist, step by step of the guide."""
    shown = [drawn.take.frames, drawn.imagined]
    if drawn.rollout is not None:
        steps = drawn.rollout.position.astype(int)
        parts = [each[np.minimum(steps, len(each) - 1)] for each in shown if each is not None]
        parts.append(drawn.rollout.frames)
    else:
        assert drawn.imagined is not None
        steps = np.arange(len(drawn.imagined))
        parts = [each[np.minimum(steps, len(each) - 1)] for each in shown if each is not None]
    height = min(part.shape[1] for part in parts)
    return np.concatenate([part[:, :height] for part in parts], axis=2)
