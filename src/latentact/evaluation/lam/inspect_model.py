"""Diagnostics of a latent action model on frame pairs that do not occur in training.

Frames are reversed, repeated, paired across cuts, rolled out with latents of another video, or partly grayed
out. Only the contract of `LatentActionModel` is used, so that any model can be inspected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latentact.data.store import known_rows
from latentact.data.windows import Clips
from latentact.evaluation.lam import diagnostics
from latentact.evaluation.lam.images import resize
from latentact.evaluation.lam.metrics import (
    FEWEST_PROBED,
    bootstrap_groups,
    derangement,
    encode_rows,
    halves_of,
)
from latentact.evaluation.lam.probes import ProbeData, linear_probe

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64, Shaped, UInt8

    from latentact.data.store import FrameStore
    from latentact.lams.contract import LatentActionModel
    from latentact.types import Clip

PAIRS = 256  # transitions that are evaluated
BATCH = 64
STEPS = 4  # steps of a rollout, as in Genie
GAPS = (0.5, 1, 2, 4)  # frame gaps of the gap curve, in multiples of the model's gap
CELLS = 8  # cells per image side that are grayed out in turn
SALIENT = 12  # transitions whose parts are grayed out
MOVES = 8  # change in gray levels above which a pixel counts as moving


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model on one set of held-out transitions; `missing` collects notes on absent metrics."""

    model: LatentActionModel
    store: FrameStore
    episodes: np.ndarray
    gap: int
    seed: int
    device: str
    rows: np.ndarray
    missing: list[str] = field(default_factory=list)

    @property
    def rgb(self) -> bool:
        """Whether frames are RGB images rather than grids."""
        return self.store.frames.shape[-1] == 3

    def ahead(self, rows: np.ndarray, steps: int) -> np.ndarray:
        """Return up to PAIRS evenly spread rows that have a frame `steps` rows later in their episode."""
        ends = self.store.starts + self.store.lengths
        kept = rows[rows + steps < ends[self.store.episode[rows]]]
        return kept[np.unique(np.linspace(0, len(kept) - 1, min(len(kept), PAIRS)).astype(int))]

    def frames(self, rows: np.ndarray) -> torch.Tensor:
        """Return the frames at rows [n, t] as [n, t, c, h, w]."""
        return torch.from_numpy(np.asarray(self.store.frames[rows])).permute(0, 1, 4, 2, 3)

    def latents(self, *timesteps: np.ndarray) -> np.ndarray:
        """Return latents between the last two of the given timesteps, each an array of rows."""
        rows = np.stack(timesteps, axis=1)
        parts = [
            self.encode(self.frames(part), part) for part in np.split(rows, range(BATCH, len(rows), BATCH))
        ]
        return np.concatenate(parts)

    def encode(self, frames: torch.Tensor, rows: np.ndarray) -> np.ndarray:
        """Return the latents of the last transition of clips; states are taken at `rows` [n, t]."""
        states = None
        if self.model.state_size and self.store.state is not None:
            states = torch.from_numpy(self.store.state[rows]).to(self.device)
        latent = self.model.encode(frames.to(self.device), last=True, states=states)
        return latent.vectors[:, -1].flatten(1).float().cpu().numpy()


def algebra(case: Case) -> dict[str, float] | None:
    """Return how additive latents are; None if episodes are too short."""
    a = case.ahead(case.rows, 2 * case.gap)
    if not len(a):
        case.missing.append("Episodes are shorter than two transitions, so additivity is not evaluated.")
        return None
    b, c = a + case.gap, a + 2 * case.gap
    found = [case.latents(*pair) for pair in ((a, b), (b, c), (a, c), (b, a), (a, a))]
    return diagnostics.algebra(*found)


def leakage(case: Case, rng: np.random.Generator) -> dict[str, Any] | None:
    """Measure whether latents encode the next frame: S-PCFC, and predictions of frames across cuts."""
    past = case.ahead(case.rows, 2 * case.gap)
    if not len(past):
        return None
    middle = past + case.gap
    found: dict[str, Any] = diagnostics.past_future_cosine(
        case.latents(past, middle), case.latents(middle + case.gap, middle)
    )
    found["across_cuts"] = None
    if not case.model.generative or not case.rgb:
        return found
    if len(np.unique(case.store.episode[case.rows])) < 2:
        case.missing.append(
            "There is only one held-out episode, so predictions across a cut are not evaluated."
        )
        return found
    episode = case.store.episode[past]
    elsewhere = np.array([rng.choice(case.rows[case.store.episode[case.rows] != e]) for e in episode])
    z = torch.from_numpy(case.latents(past, elsewhere))
    recon, copy = 0.0, 0.0
    for i in range(0, len(past), BATCH):
        part = slice(i, i + BATCH)
        now, other = case.frames(np.stack([past[part], elsewhere[part]], 1)).to(case.device).split(1, dim=1)
        predicted = case.model.predict(now, _tokens(case, z[part]))
        size = predicted.shape[-2:]
        truth = resize(other[:, 0], size)
        recon += float((predicted.float() - truth).square().sum())
        copy += float((resize(now[:, 0], size) - truth).square().sum())
    found["across_cuts"] = recon / copy if copy > 0 else None
    return found


def _tokens(case: Case, flat: torch.Tensor) -> torch.Tensor:
    return flat.unflatten(1, (case.model.spec.tokens, -1)).to(case.device)


def controllability(case: Case) -> dict[str, Any] | None:
    """Return delta PSNR and frame differences of rollouts with the video's and another video's latents."""
    longest = int(((case.store.lengths[case.store.episode[case.rows]] - 1) // case.gap).max())
    steps = min(STEPS, longest)
    clips = Clips(
        case.store,
        episodes=case.episodes,
        frame_gap=case.gap,
        context=case.model.context,
        horizon=steps,
    )
    rows = clips.rows[np.unique(np.linspace(0, len(clips) - 1, min(len(clips), PAIRS)).astype(int))]
    z = torch.cat(
        [_following(case, clips.clip(rows[i : i + BATCH]), steps) for i in range(0, len(rows), BATCH)]
    )
    order = torch.from_numpy(derangement(len(rows), np.random.default_rng(case.seed))).to(z.device)
    own, other, changed, moved = [], [], 0.0, 0.0
    for i in range(0, len(rows), BATCH):
        part = slice(i, i + BATCH)
        frames = clips.clip(rows[part]).frames.to(case.device)
        rolled = [_rollout(case.model, frames[:, :-steps], each[part]) for each in (z, z[order])]
        truth = torch.stack([resize(f, rolled[0].shape[-2:]) for f in frames[:, -steps:].unbind(1)], 1)
        for errors, guess in zip((own, other), rolled, strict=True):
            errors.append(((guess - truth) / 255).square().mean((2, 3, 4)).cpu().numpy())
        now = resize(frames[:, -steps - 1], rolled[0].shape[-2:])
        changed += float((rolled[0][:, 0] - rolled[1][:, 0]).square().sum())
        moved += float((now - truth[:, 0]).square().sum())
    if moved == 0:
        case.missing.append("Nothing moves in the held-out video, so the use of latents is not evaluated.")
        return None
    return {
        "delta_psnr": diagnostics.delta_psnr(np.concatenate(own), np.concatenate(other)),
        "steps": steps,
        "prediction_change": changed / moved,
    }


def _following(case: Case, clip: Clip, steps: int) -> torch.Tensor:
    """Return the latents of the last `steps` transitions of clips."""
    valid, states = clip.valid.to(case.device), None
    if case.model.state_size and clip.states is not None:
        states = clip.states.to(case.device)
    return case.model.encode(clip.frames.to(case.device), valid, states=states).vectors[:, -steps:]


def _rollout(model: LatentActionModel, past: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return frames predicted autoregressively, float `[b, t, c, h2, w2]`."""
    frames, out = past, []
    for step in range(z.shape[1]):
        predicted = model.predict(frames, z[:, step])
        out.append(predicted.float())
        back = resize(predicted, past.shape[-2:]).round().clamp(0, 255).byte()
        frames = torch.cat([frames, back[:, None]], dim=1)
    return torch.stack(out, dim=1)


def gap_curve(case: Case) -> list[dict[str, Any]]:
    """Return the probe score of the action and the share of moving pixels at other frame gaps."""
    curve: list[dict[str, Any]] = []
    store = case.store
    actions = None if store.action_space is None else store.actions(case.episodes)
    for gap in sorted({max(1, round(case.gap * factor)) for factor in GAPS}):
        ends = (store.starts + store.lengths)[store.episode[case.rows]]
        rows = case.rows[case.rows + gap < ends]
        if len(rows) < 2 * FEWEST_PROBED:
            continue
        clips = Clips(store, episodes=case.episodes, frame_gap=gap, context=case.model.context)
        latents = encode_rows(case.model, clips, rows, case.device)[0].flatten(1).numpy()
        change = np.mean([_motion(store.frames[r], store.frames[r + gap]) for r in rows[:PAIRS]])
        row: dict[str, Any] = {"frames": gap, "seconds": gap / store.fps, "moving": float(change)}
        fit, score = halves_of(store.episode[rows], rows, gap, case.model.context, case.seed)
        if actions is not None and min(fit.sum(), score.sum()) >= FEWEST_PROBED:
            row["probe"] = _probe_at(case, rows, latents, actions[rows], fit, score)
        curve.append(row)
    return curve


def _probe_at(
    case: Case,
    rows: Int64[np.ndarray, "n"],
    latents: Float[np.ndarray, "n f"],
    actions: Shaped[np.ndarray, "n *a"],
    fit: Bool[np.ndarray, "n"],
    score: Bool[np.ndarray, "n"],
) -> dict[str, object]:
    known, actions = known_rows(actions), np.ma.getdata(actions)
    if actions.ndim > 1 and case.store.state is not None:
        actions = diagnostics.without_state(actions, case.store.state[rows], fit & known)
    group = bootstrap_groups(case.store.episode[rows], score)
    fitted, scored = (
        ProbeData(features=latents[part & known], targets=actions[part & known], episode=group[part & known])
        for part in (fit, score)
    )
    return linear_probe(fitted, scored, seed=case.seed).to_json()


def _motion(now: UInt8[np.ndarray, "h w c"], after: UInt8[np.ndarray, "h w c"]) -> float:
    return float((np.abs(now.astype(np.int16) - after).max(-1) > MOVES).mean())


def saliency(case: Case, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Return how much latents respond to moving regions: cells of both frames are grayed out in turn."""
    rows = case.rows
    motion = np.array([_motion(case.store.frames[r], case.store.frames[r + case.gap]) for r in rows[:PAIRS]])
    order = np.flatnonzero(motion > 0)
    if not len(order):
        case.missing.append("Nothing moves in the held-out video, so saliency is not evaluated.")
        return None
    chosen = rows[order[np.unique(np.linspace(0, len(order) - 1, min(len(order), SALIENT)).astype(int))]]
    pairs = np.stack([chosen, chosen + case.gap], 1)
    frames = case.frames(pairs)
    height, width = frames.shape[-2:]
    cells = min(CELLS, height, width)
    y, x = (np.linspace(0, side, cells + 1).astype(int) for side in (height, width))
    moved = ((frames[:, 0].short() - frames[:, 1].short()).abs().amax(1) > MOVES).numpy()
    z = case.encode(frames, pairs)
    response, moving = np.zeros((2, len(chosen), cells, cells))
    for i in range(cells):
        for j in range(cells):
            part = (slice(y[i], y[i + 1]), slice(x[j], x[j + 1]))
            covered = frames.clone()
            covered[..., part[0], part[1]] = frames.float().mean((1, 3, 4), keepdim=True).byte()
            response[:, i, j] = np.linalg.norm(case.encode(covered, pairs) - z, axis=1)
            moving[:, i, j] = moved[:, part[0], part[1]].any((1, 2))
    share, area = diagnostics.share_inside(response, moving > 0)
    arrays |= {"salient_now": frames[:, 0].permute(0, 2, 3, 1).numpy(), "salient": response}
    return {"share_inside": share, "area": area, "transitions": len(chosen)}
