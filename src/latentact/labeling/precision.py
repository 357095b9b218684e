"""Precisions of a LAM, and selection of the fastest that preserves the codes of given data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import torch

from latentact.data.format import Unreadable
from latentact.data.stream import FrameStream
from latentact.device import supports_bf16, supports_int8
from latentact.labeling.episode import encode_clip
from latentact.lams.contract import LatentActionModel
from latentact.nn.int8 import int8
from latentact.types import LatentActions

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "int8", "auto")
_TRIED, _KEPT = 32, 0.99  # transitions of the trial, and the fraction of codes to preserve
type States = Callable[[int, Sequence[int]], np.ndarray]
"""Function from episode and rows within it to robot states ``[n, s]``."""


def apply_precision(model: LatentActionModel, precision: str) -> LatentActionModel:
    """Return the model with the layers of a precision."""
    return int8(model) if precision == "int8" else model


def select_precision(
    model: LatentActionModel, stream: FrameStream, gap: int, device: str, workers: int, states: States | None
) -> str:
    """Return the fastest of int8, bf16 and fp32 that the device supports natively and that preserves codes.

    Args:
        model: in evaluation mode, on the device.
        stream: the data; 99 % of the codes of its first transitions must be equal to those of fp32, or
            without a codebook 99 % of their variance preserved.
        gap: frames between the two frames of a transition.
        device: cpu, cuda or mps.
        workers: decoding threads.
        states: robot states, for a model that uses them.
    """
    native = {"int8": supports_int8(device), "bf16": supports_bf16(device)}
    if not any(native.values()):
        return "fp32"
    number = next(i for i, length in enumerate(stream.lengths) if length > gap)
    frames, frame_indices = [], []
    with closing(stream.episodes([number], workers)) as episodes:
        _, chunks = next(episodes)
        try:
            for chunk in chunks:
                frames.append(chunk.frames)
                frame_indices += chunk.frame_indices
                if sum(map(len, frames)) > _TRIED * gap:
                    break
        except Unreadable:
            return "fp32"  # no trial without frames
    clip = torch.from_numpy(np.concatenate(frames)[::gap][: _TRIED + 1]).permute(0, 3, 1, 2)
    clip, clip_states = clip.to(device), None
    if states:
        rows = states(number, frame_indices[::gap][: len(clip)])[None].astype(np.float32)
        clip_states = torch.from_numpy(rows).to(device)
    exact = encode_clip(model, clip[None], "fp32", states=clip_states)
    what = "variance of the latent actions" if exact.codes is None else "codes"
    for precision in (name for name, here in native.items() if here):
        quick = encode_clip(apply_precision(model, precision), clip[None], precision, states=clip_states)
        share = _agreement(exact, quick)
        log.info(
            "%s preserves %.1f %% of the %s of %d transitions", precision, 100 * share, what, len(clip) - 1
        )
        if share >= _KEPT:
            return precision
    return "fp32"


def _agreement(exact: LatentActions, quick: LatentActions) -> float:
    """Return the fraction of equal codes, or without codes that of preserved variance."""
    if exact.codes is not None and quick.codes is not None:
        return (exact.codes == quick.codes).float().mean().item()
    x, y = exact.vectors.flatten(0, 1), quick.vectors.flatten(0, 1)
    return 1 - ((x - y).square().mean() / (x - x.mean(0)).square().mean().clamp(min=1e-12)).item()
