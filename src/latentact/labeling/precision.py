"""In which precision a LAM is computed, and the fastest that says the same of given data."""

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
_TRIED, _KEPT = 32, 0.99  # transitions on which a precision is tried, and what share of them it has to keep
type States = Callable[[int, Sequence[int]], np.ndarray]
"""Episode and rows in it -> the robot's states there."""


def prepared(model: LatentActionModel, precision: str) -> LatentActionModel:
    """Return the model with the layers that a precision wants."""
    return int8(model) if precision == "int8" else model


def select_precision(
    model: LatentActionModel, stream: FrameStream, gap: int, device: str, workers: int, states: States | None
) -> str:
    """Return int8, bf16 or fp32: the first that the device multiplies natively and that keeps the codes.

    Args:
        model: in evaluation mode, on the device.
        stream: the data, of whose first transitions 99 % have to stay the same; without a codebook, 99 % of
            their variance.
        gap: frames between the two moments of a transition.
        device: cpu, cuda or mps.
        workers: decoding threads.
        states: of the robot, for a model that observes them.
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
            return "fp32"  # what cannot be tried is not risked
    clip = torch.from_numpy(np.concatenate(frames)[::gap][: _TRIED + 1]).permute(0, 3, 1, 2)
    clip, state = clip.to(device), None
    if states:
        told = states(number, frame_indices[::gap][: len(clip)])[None].astype(np.float32)
        state = torch.from_numpy(told).to(device)
    exact = encode_clip(model, clip[None], "fp32", state=state)
    what = "variance of the latent actions" if exact.codes is None else "codes"
    for precision in (name for name, here in native.items() if here):
        quick = encode_clip(prepared(model, precision), clip[None], precision, state=state)
        share = _agreement(exact, quick)
        log.info("%s keeps %.1f %% of the %s of %d transitions", precision, 100 * share, what, len(clip) - 1)
        if share >= _KEPT:
            return precision
    return "fp32"


def _agreement(exact: LatentActions, quick: LatentActions) -> float:
    """Return the share of equal codes, or without codes that of the variance which is kept."""
    if exact.codes is not None and quick.codes is not None:
        return (exact.codes == quick.codes).float().mean().item()
    x, y = exact.vectors.flatten(0, 1), quick.vectors.flatten(0, 1)
    return 1 - ((x - y).square().mean() / (x - x.mean(0)).square().mean().clamp(min=1e-12)).item()
