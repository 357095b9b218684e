"""A guide: the latent actions of one demonstration, on disk and in time.

It holds one latent action per frame of the demonstration (at `fps`), each for the transition to the frame
that is the LAM's gap later, as `latentact label` gives a row. A control loop of another rate holds each
latent until its time is over, or resamples them in time.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from latentact.data.latents import load_described, require_codes
from latentact.errors import UserError, did_you_mean
from latentact.io.atomic import atomic_write
from latentact.io.records import Record, parse_record
from latentact.io.specs import Rate, SpecRecord
from latentact.io.tensors import require_array, to_arrays
from latentact.types import LatentActionSpec

TIME_BASES = ("hold", "resample")
SAME_RATE = 0.01
"""Relative difference up to which two rates are one."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """The latent actions of one demonstration; entry i is the transition from its frame i."""

    spec: LatentActionSpec
    """What they mean."""
    fps: float
    """Latent actions per second; 0 where the rate of the frames is unknown."""
    vectors: Float32[np.ndarray, "n k d"]
    """After the quantiser."""
    continuous: Float32[np.ndarray, "n k d"]
    """Before it."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices."""

    def __len__(self) -> int:
        """Number of latent actions."""
        return len(self.vectors)

    @property
    def timestamps(self) -> Float64[np.ndarray, " n"]:
        """Seconds into the demonstration at which each transition begins; NaN where unknown."""
        return np.arange(len(self)) / self.fps if self.fps else np.full(len(self), np.nan)

    def save(self, folder: str | Path) -> None:
        """Write `latents.safetensors` and `latents.pt`, each with the latents, their times and the spec."""
        from safetensors.torch import save

        tensors = {
            "latent_actions": torch.from_numpy(self.continuous.copy()),  # may be the same array
            "vectors": torch.from_numpy(self.vectors),
            "timestamps": torch.from_numpy(self.timestamps),
        }
        if self.codes is not None:
            tensors["codes"] = torch.from_numpy(self.codes)
        about = {"spec": asdict(self.spec), "fps": self.fps}
        with atomic_write(Path(folder) / "latents.safetensors") as partial:
            partial.write_bytes(save(tensors, {"latentact": json.dumps(about)}))
        with atomic_write(Path(folder) / "latents.pt") as partial:
            torch.save({**tensors, "metadata": about}, partial)

    @classmethod
    def load(cls, path: str | Path) -> Guide:
        """Read what `save` wrote: the folder, or either file; nothing in it is executed.

        Raises:
            UserError: it is missing, truncated or something else.
        """
        path = Path(path)
        path = path / "latents.safetensors" if path.is_dir() else path
        tensors, metadata = load_described(path)
        if metadata is None:
            raise UserError(
                f"{path} holds no guide; extract one with: latentact imitate --mode extract_only."
            )
        about = parse_record(_GuideRecord, metadata, str(path))
        spec, arrays = about.spec.spec(), to_arrays(tensors, path)
        n = len(tensors.get("timestamps", ()))
        if n == 0:
            raise UserError(f"{path} must hold at least one latent action, got none; extract it again.")
        for name in ("vectors", "latent_actions"):
            require_array(path, name, arrays.get(name), (n, spec.tokens, spec.token_dim), ("float32",))
        return cls(
            spec=spec,
            fps=about.fps,
            vectors=arrays["vectors"],
            continuous=arrays["latent_actions"],
            codes=require_codes(path, arrays, spec, n),
        )


class _GuideRecord(Record):
    """What a guide's file says about it."""

    spec: SpecRecord
    fps: Rate


def follow(guide: Guide, fps: float, time_base: str) -> Float64[np.ndarray, " m"]:
    """Return where in the guide each step of a control loop is, as a real index; whole numbers for `hold`.

    Args:
        guide: n latent actions.
        fps: control steps per second.
        time_base: hold: each latent until the time of the next; resample: in between them, too.

    Raises:
        UserError: a rate is unknown, or holding would skip latents.
    """
    if time_base not in TIME_BASES:
        raise UserError(f"unknown time base {time_base!r}{did_you_mean(time_base, TIME_BASES)}")
    if not guide.fps or not fps:
        which = "the guide" if not guide.fps else "the control loop"
        raise UserError(f"the rate of {which} is unknown; give --target-fps for a guide, --fps for control.")
    if time_base == "hold" and fps < guide.fps * (1 - SAME_RATE):
        raise UserError(
            f"the guide has {guide.fps:g} latent actions per second and control runs at {fps:g}, so that "
            f"holding would skip some; use --time-base resample, or --target-fps {fps:g} where the LAM can."
        )
    if abs(fps / guide.fps - 1) <= SAME_RATE:
        return np.arange(len(guide), dtype=np.float64)
    steps = np.arange(math.ceil(len(guide) * fps / guide.fps - 1e-6)) / fps
    position = np.minimum(steps * guide.fps, len(guide) - 1)
    return np.floor(steps * guide.fps + 1e-6).clip(max=len(guide) - 1) if time_base == "hold" else position


def tokens_at(guide: Guide, position: np.ndarray, kind: str) -> Float32[np.ndarray, "m f"]:
    """Return the guide's tokens at real indices, flat: numbers interpolated, codes from the nearest.

    Args:
        guide: n latent actions.
        position: what `follow` returned.
        kind: continuous, vectors or codes (as numbers).
    """
    if kind == "codes" or (kind == "vectors" and guide.spec.codebook_size is not None):
        values = guide.codes if kind == "codes" else guide.vectors
        if values is None:
            raise UserError(
                f"the policy follows codes and the guide of {guide.spec.model} has none; "
                "extract it with the LAM that labelled the policy's data."
            )
        nearest = np.floor(position + 0.5).astype(int)
        return values[nearest].reshape(len(position), -1).astype(np.float32)
    values = (guide.continuous if kind == "continuous" else guide.vectors).reshape(len(guide), -1)
    low = np.floor(position).astype(int)
    part = (position - low)[:, None]
    high = np.minimum(low + 1, len(guide) - 1)
    return (values[low] * (1 - part) + values[high] * part).astype(np.float32)


def agreement(guide: Guide, happened: Guide, position: np.ndarray) -> dict[str, Any]:
    """Compare the guide with the latent actions of what really happened, step by step.

    Args:
        guide: what was to be followed.
        happened: latent actions of the rollout, one per control step.
        position: where in the guide each control step was.

    Returns:
        `measure` (cosine, or share of equal codes), `steps` (one number each), their `mean`, and
        `other_moments`: the mean agreement of the same steps with all moments of the guide, which is what a
        rollout reaches that has the guide's average and ignores its order.
    """
    count = min(len(happened), len(position))
    nearest = np.floor(position[:count] + 0.5).astype(int)
    if guide.codes is not None and happened.codes is not None:
        same = (happened.codes[:count, None] == guide.codes[None]).mean(2)
        measure = "equal codes"
    else:
        ours, theirs = (_directions(g.vectors) for g in (happened, guide))
        same, measure = ours[:count] @ theirs.T, "cosine"
    steps = same[np.arange(count), nearest]
    return {
        "measure": measure,
        "mean": float(steps.mean()),
        "other_moments": float(same.mean()),
        "steps": [round(float(value), 5) for value in steps],
    }


def _directions(vectors: np.ndarray) -> np.ndarray:
    flat = vectors.reshape(len(vectors), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(min=1e-9)
