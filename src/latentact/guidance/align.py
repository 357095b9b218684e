"""Temporal alignment of a guide with a control loop, and agreement of a rollout with its guide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from latentact.data.time_base import rates_agree
from latentact.errors import UserError, require_one_of
from latentact.guidance.guide import Guide

TIME_BASES = ("hold", "resample")


def align_to_rate(guide: Guide, fps: float, time_base: str) -> Float64[np.ndarray, " m"]:
    """Return the position in the guide of each control step, as a fractional index; integers for `hold`.

    Args:
        guide: n latent actions.
        fps: control steps per second.
        time_base: hold: each latent action lasts until the next one starts; resample: interpolated in time.

    Raises:
        UserError: a rate is unknown, or `hold` would skip latent actions.
    """
    require_one_of("time_base", time_base, TIME_BASES)
    if not guide.fps or not fps:
        which = "the guide" if not guide.fps else "the control loop"
        raise UserError(f"the rate of {which} is unknown. Give --target-fps for a guide, --fps for control.")
    if time_base == "hold" and fps < guide.fps and not rates_agree(fps, guide.fps):
        raise UserError(
            f"the guide has {guide.fps:g} latent actions per second and control runs at {fps:g}, so "
            f"--time-base hold would skip some. Use --time-base resample, or --target-fps {fps:g} if the LAM "
            "supports it."
        )
    if rates_agree(fps, guide.fps):
        return np.arange(len(guide), dtype=np.float64)
    steps = np.arange(math.ceil(len(guide) * fps / guide.fps - 1e-6)) / fps
    position = np.minimum(steps * guide.fps, len(guide) - 1)
    return np.floor(steps * guide.fps + 1e-6).clip(max=len(guide) - 1) if time_base == "hold" else position


def sample_tokens(guide: Guide, position: np.ndarray, kind: str) -> Float32[np.ndarray, "m f"]:
    """Return the guide's tokens at fractional indices, flattened: vectors interpolated, codes nearest.

    Args:
        guide: n latent actions.
        position: result of `align_to_rate`.
        kind: continuous, vectors or codes (as floats).
    """
    if kind == "codes" and guide.codes is None:
        raise UserError(
            f"the policy needs codes, but the guide of {guide.spec.model} has none. Extract it with the "
            "LAM that labeled the policy's data."
        )
    return getattr(guide.at(position), kind).reshape(len(position), -1).astype(np.float32)


def latent_agreement(guide: Guide, achieved: Guide, position: np.ndarray) -> dict[str, Any]:
    """Compare the guide with the latent actions of a rollout, step by step.

    Args:
        guide: the guide.
        achieved: latent actions of the rollout's frames, one per control step.
        position: position in the guide of each control step.

    Returns:
        `measure` (cosine, or fraction of equal codes), `steps` (one value each), their `mean`, and `chance`:
        the mean agreement of these steps with all steps of the guide, the score of a rollout that matches the
        guide on average and ignores its order.
    """
    count = min(len(achieved), len(position))
    nearest = np.floor(position[:count] + 0.5).astype(int)
    if guide.codes is not None and achieved.codes is not None:
        same = (achieved.codes[:count, None] == guide.codes[None]).mean(2)
        measure = "equal codes"
    else:
        same = _directions(achieved.vectors)[:count] @ _directions(guide.vectors).T
        measure = "cosine"
    steps = same[np.arange(count), nearest]
    return {
        "measure": measure,
        "mean": float(steps.mean()),
        "chance": float(same.mean()),
        "steps": [round(float(value), 5) for value in steps],
    }


def _directions(vectors: np.ndarray) -> np.ndarray:
    flat = vectors.reshape(len(vectors), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(min=1e-9)
