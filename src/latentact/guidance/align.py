"""A guide in time: at which of its latent actions a control loop is, and how well a rollout follows it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from latentact.errors import UserError, did_you_mean
from latentact.guidance.guide import Guide

TIME_BASES = ("hold", "resample")


SAME_RATE = 0.01
"""Relative difference up to which two rates are one."""


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


def sample_tokens(guide: Guide, position: np.ndarray, kind: str) -> Float32[np.ndarray, "m f"]:
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
                "extract it with the LAM that labeled the policy's data."
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
