"""Images of a latent action model: predicted and real frames, and transfer of latents to other scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8
    from torch import Tensor

    from latentact.data.store import FrameStore
    from latentact.data.windows import Clips
    from latentact.lams.contract import LatentActionModel

EXAMPLES = 8
SOURCES = 4
CANDIDATES = 64  # candidates, from which sources with different latents are chosen
STARTS = 6


def evaluation_images(
    model: LatentActionModel,
    store: FrameStore,
    clips: Clips,
    rows: Int64[np.ndarray, "m"],
    vectors: Float[Tensor, "m k d"],
    motion: Float[np.ndarray, "m"],
    rng: np.random.Generator,
    device: str,
) -> dict[str, np.ndarray]:
    """Return the images of `lam.npz`; none for frames that are not RGB.

    Args:
        model: model in evaluation mode.
        store: frames.
        clips: windows of the store with the model's context.
        rows: first rows of the transitions.
        vectors: latents of the transitions.
        motion: amount of change in each transition, to select those with visible motion.
        rng: generator of the choice.
        device: device of the model.
    """
    if store.frames.shape[-1] != 3:
        return {}
    episode = store.episode[rows]
    moving = rng.permutation(np.flatnonzero(motion >= np.median(motion)))

    examples = _spread_over_episodes(moving, episode, EXAMPLES)
    frames = clips.clip(rows[examples]).frames.to(device)
    predicted = model.predict(frames[:, :-1], vectors[examples].to(device))
    size = predicted.shape[-2:]

    sources = _unlike(_spread_over_episodes(moving, episode, CANDIDATES), vectors.flatten(1).numpy(), SOURCES)
    elsewhere = moving[~np.isin(episode[moving], episode[sources])]
    starts = _spread_over_episodes(elsewhere if len(elsewhere) else moving, episode, STARTS)
    shown = clips.clip(rows[sources]).frames[:, -2:]
    past = clips.clip(rows[starts]).frames[:, :-1].to(device)
    grid = [
        _images(model.predict(past, vectors[[s]].expand(len(starts), -1, -1).to(device)), size)
        for s in sources
    ]
    return {
        "now": _images(frames[:, -2], size),
        "next": _images(frames[:, -1], size),
        "predicted": _images(predicted, size),
        "transfer_source": np.stack([_images(shown[:, 0], size), _images(shown[:, 1], size)], axis=1),
        "transfer_start": _images(past[:, -1], size),
        "transfer_grid": np.stack(grid),
        "transfer_source_episode": episode[sources],
        "transfer_source_time": store.timestamps[rows[sources]],
        "transfer_start_episode": episode[starts],
    }


def resize(frames: UInt8[Tensor, "b c h w"], size: tuple[int, ...]) -> Float[Tensor, "b c h2 w2"]:
    """Return `frames` as floats 0..255 at the given height and width."""
    if frames.shape[-2:] == torch.Size(size):
        return frames.float()
    return F.interpolate(frames.float(), size=size, mode="bilinear", antialias=True)


def _images(frames: UInt8[Tensor, "b c h w"], size: tuple[int, ...]) -> UInt8[np.ndarray, "b h2 w2 c"]:
    return resize(frames, size).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def _spread_over_episodes(
    candidates: Int64[np.ndarray, "q"], episode: Int64[np.ndarray, "m"], count: int
) -> Int64[np.ndarray, "r"]:
    """Select up to `count` candidates in order, one per episode before a second of any."""
    turn: dict[int, int] = {}
    rank = []
    for candidate in candidates:
        turn[int(episode[candidate])] = turn.get(int(episode[candidate]), -1) + 1
        rank.append(turn[int(episode[candidate])])
    return candidates[np.argsort(rank, kind="stable")[:count]]


def _unlike(
    candidates: Int64[np.ndarray, "q"], latents: Float[np.ndarray, "m f"], count: int
) -> Int64[np.ndarray, "r"]:
    """Select up to `count` candidates with different latents by farthest-point sampling."""
    points = latents[candidates] - latents[candidates].mean(0)
    taken = [int(np.argmin(np.square(points).sum(1)))]
    while len(taken) < min(count, len(candidates)):
        distance = np.square(points[:, None] - points[taken]).sum(-1).min(1)
        distance[taken] = -1
        taken.append(int(np.argmax(distance)))
    return candidates[taken]
