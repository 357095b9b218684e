"""Evaluate a latent action model on held-out episodes: prediction error, use of latents, probes of actions.

Every metric has a baseline: for reconstruction, copying the last frame and shuffled latents; for probes, a
state-only floor and a shuffled-future control.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from latentact.data.store import known_rows
from latentact.data.windows import Clips
from latentact.errors import UserError
from latentact.evaluation.lam.codebook import codebook_health
from latentact.evaluation.lam.images import evaluation_images, resize
from latentact.evaluation.lam.probes import ProbeData, linear_probe, mlp_probe, principal_components

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64, Shaped
    from torch import Tensor

    from latentact.data.store import FrameStore
    from latentact.lams.contract import LatentActionModel

BATCH = 128
FEWEST_PROBED = 10  # transitions needed to fit probes, and to score them
IGNORED_BELOW = 1.5  # ratio of shuffled to matching error below which latents count as ignored
COLLAPSED_BELOW = 0.1  # perplexity over codebook size


@dataclass(frozen=True, kw_only=True)
class LamEvaluation:
    """Evaluation of one latent action model."""

    numbers: dict[str, Any]
    """Content of `lam.json`: errors, probes, codebook, warnings."""
    arrays: dict[str, np.ndarray]
    """Content of `lam.npz`: latents with episode, time and action; images of predictions and transfer."""


def evaluate_lam(
    model: LatentActionModel,
    store: FrameStore,
    *,
    episodes: Collection[int] | np.ndarray,
    frame_gap: int,
    seed: int = 0,
    max_transitions: int = 4096,
    device: str = "cpu",
) -> LamEvaluation:
    """Evaluate `model` on held-out `episodes`.

    Probes are fitted on half of the episodes (drawn by `seed`) and scored on the others; a single episode is
    split in time.

    Args:
        model: model on `device`; it is evaluated in evaluation mode, and its mode is restored.
        store: frames, and states and actions if available.
        episodes: held-out episodes, whose actions are used.
        frame_gap: frames between the two timesteps of a transition.
        seed: seed of the choice of transitions, halves and shuffles.
        max_transitions: maximum number of transitions, sampled at random.
        device: device of the model.

    Raises:
        UserError: no episode is long enough for one transition, or latents are not finite.
    """
    clips = Clips(store, episodes=episodes, frame_gap=frame_gap, context=model.context)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(clips.rows)[:max_transitions])
    training = model.training
    model.eval()
    with torch.no_grad():
        vectors, codes = encode_rows(model, clips, rows, device)
        if not torch.isfinite(vectors).all():
            raise UserError(
                "latents are not finite, so training diverged; train again with a lower learning rate."
            )
        order = derangement(len(rows), rng)
        errors = _errors(model, clips, rows, vectors, order, device) if model.generative else {}
        futures = other_future(store, rows, frame_gap, rng)
        controls, _ = encode_rows(model, clips, rows, device, futures=futures)
        shown = (
            evaluation_images(model, store, clips, rows, vectors, errors["copy"], rng, device)
            if errors
            else {}
        )
    model.train(training)

    latents, size = _flat(vectors), model.spec.codebook_size
    actions = None if store.action_space is None else store.actions(episodes)[rows]
    health = None if codes is None or size is None else asdict(codebook_health(codes, size))
    probes, notes = _probes(
        store, rows, actions, latents, _flat(controls), gap=frame_gap, context=model.context, seed=seed
    )
    means = {f"{name}_mse": float(error.mean()) for name, error in errors.items()}
    numbers = {
        **means,
        "probes": probes,
        "codebook": health,
        "warnings": [*_warnings(means, probes, health), *notes],
        "transitions": len(rows),
        "episodes": len(np.unique(store.episode[rows])),
        "action_names": list(store.action_names),
    }
    arrays = {
        "vectors": latents,
        "row": rows,
        "episode": store.episode[rows],
        "time": store.timestamps[rows],
        "action": None if actions is None else np.ma.getdata(actions),
        "codes": codes,
    }
    known = {name: values for name, values in arrays.items() if values is not None}
    return LamEvaluation(numbers=numbers, arrays=known | shown)


def _flat(vectors: Tensor) -> Float[np.ndarray, "m f"]:
    return vectors.flatten(1).numpy()


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, start + BATCH) for start in range(0, count, BATCH))


def encode_rows(
    model: LatentActionModel,
    clips: Clips,
    rows: Int64[np.ndarray, "m"],
    device: str,
    futures: Int64[np.ndarray, "m"] | None = None,
) -> tuple[Float[Tensor, "m k d"], Int64[np.ndarray, "m k"] | None]:
    """Return the latents of transitions that start at `rows`; frames at `futures` replace the next ones."""
    vectors, codes = [], []
    for part in _batches(len(rows)):
        clip = clips.clip(rows[part])
        frames, states = clip.frames, clip.states if model.state_size else None
        if futures is not None:
            other = torch.from_numpy(clips.store.frames[futures[part]]).permute(0, 3, 1, 2)
            frames = torch.cat([frames[:, :-1], other[:, None]], dim=1)
            if states is not None and clips.store.state is not None:
                other = torch.from_numpy(clips.store.state[futures[part]])
                states = torch.cat([states[:, :-1], other[:, None]], dim=1)
        states = None if states is None else states.to(device)
        latent = model.encode(frames.to(device), clip.valid.to(device), last=True, states=states)
        vectors.append(latent.vectors[:, -1].float().cpu())
        if latent.codes is not None:
            codes.append(latent.codes[:, -1].cpu().numpy())
    return torch.cat(vectors), np.concatenate(codes) if codes else None


def _errors(
    model: LatentActionModel,
    clips: Clips,
    rows: Int64[np.ndarray, "m"],
    vectors: Float[Tensor, "m k d"],
    order: Int64[np.ndarray, "m"],
    device: str,
) -> dict[str, Float[np.ndarray, "m"]]:
    """Return squared errors per transition (0..1 scale): prediction, copying, another's latent."""
    errors: dict[str, list[Tensor]] = {"recon": [], "copy": [], "shuffled": []}
    for part in _batches(len(rows)):
        frames = clips.clip(rows[part]).frames.to(device)
        past, now, after = frames[:, :-1], frames[:, -2], frames[:, -1]
        predicted = model.predict(past, vectors[part].to(device))
        misled = model.predict(past, vectors[order[part]].to(device))
        truth, copied = (resize(frame, predicted.shape[-2:]) for frame in (after, now))
        for name, guess in (("recon", predicted.float()), ("copy", copied), ("shuffled", misled.float())):
            errors[name].append(((guess - truth) / 255).square().mean((1, 2, 3)).double().cpu())
    return {name: torch.cat(parts).numpy() for name, parts in errors.items()}


def derangement(count: int, rng: np.random.Generator) -> Int64[np.ndarray, "m"]:
    """Return a random permutation without fixed points (for at least two elements)."""
    cycle = rng.permutation(count)
    order = np.empty(count, dtype=np.int64)
    order[cycle] = np.roll(cycle, 1)
    return order


def other_future(
    store: FrameStore, rows: Int64[np.ndarray, "m"], frame_gap: int, rng: np.random.Generator
) -> Int64[np.ndarray, "m"]:
    """Return, for every row, the row of the future frame of another random transition of the same episode."""
    start = store.starts[store.episode[rows]]
    transitions = store.lengths[store.episode[rows]] - frame_gap
    step = np.where(transitions > 1, 1 + rng.integers(0, np.maximum(transitions - 1, 1)), 0)
    return start + (rows - start + step) % transitions + frame_gap


def _probes(
    store: FrameStore,
    rows: Int64[np.ndarray, "m"],
    actions: Shaped[np.ndarray, "m *a"] | None,
    latents: Float[np.ndarray, "m f"],
    controls: Float[np.ndarray, "m f"],
    *,
    gap: int,
    context: int,
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    """Return the probes of `lam.json` (empty without actions) and notes on how they were measured."""
    if actions is None:
        return {}, []
    fit, score = (
        half & known_rows(actions) for half in halves_of(store.episode[rows], rows, gap, context, seed)
    )
    actions = np.asarray(np.ma.getdata(actions))
    if min(fit.sum(), score.sum()) < FEWEST_PROBED:
        return {}, [
            f"No probes: {fit.sum()} transitions to fit them and {score.sum()} to score them, and each needs "
            f"{FEWEST_PROBED}; hold out more episodes."
        ]
    if not np.ptp(actions[fit | score], axis=0).any():
        return {}, ["No probes: all actions of the held-out episodes are the same."]
    group = bootstrap_groups(store.episode[rows], score)

    def data(features: np.ndarray, targets: np.ndarray, part: np.ndarray) -> ProbeData:
        return ProbeData(features=features[part], targets=targets[part], episode=group[part])

    def halves(features: np.ndarray, targets: np.ndarray) -> tuple[ProbeData, ProbeData]:
        return data(features, targets, fit), data(features, targets, score)

    floor = present_features(store, rows, fit)
    found = {
        "latent_linear": linear_probe(*halves(latents, actions), seed=seed),
        "latent_mlp": mlp_probe(*halves(latents, actions), seed=seed),
        "state_only": max(
            linear_probe(*halves(floor, actions), seed=seed),
            mlp_probe(*halves(floor, actions), seed=seed),
            key=lambda probe: probe.score,
        ),
        "shuffled_future": linear_probe(*halves(controls, actions), seed=seed),
    }
    if actions.ndim > 1 and store.state is not None and store.state.shape[1] >= 2:
        change = store.state[rows + gap] - store.state[rows]
        found["state_change"] = linear_probe(*halves(latents, change), seed=seed)
        found["state_change_state_only"] = linear_probe(*halves(floor, change), seed=seed)
    single = len(np.unique(store.episode[rows])) == 1
    note = "There is only one held-out episode: probes are fitted on its beginning and scored on its end."
    return {name: probe.to_json() for name, probe in found.items()}, [note] if single else []


def halves_of(
    episode: Int64[np.ndarray, "m"], rows: Int64[np.ndarray, "m"], frame_gap: int, context: int, seed: int
) -> tuple[Bool[np.ndarray, "m"], Bool[np.ndarray, "m"]]:
    """Return the transitions for fitting and for scoring probes; no frame is in both."""
    present = np.unique(episode)
    if len(present) > 1:
        fitting = np.random.default_rng(seed).permutation(present)[: len(present) // 2]
        fit = np.isin(episode, fitting)
        return fit, ~fit
    middle = (rows.min() + rows.max() + frame_gap) / 2
    return rows + frame_gap < middle, rows - context * frame_gap >= middle


def bootstrap_groups(episode: Int64[np.ndarray, "m"], score: Bool[np.ndarray, "m"]) -> Int64[np.ndarray, "m"]:
    """Return the bootstrap units: episodes, or tenths of the episode if only one is scored."""
    if len(np.unique(episode[score])) > 1:
        return episode
    return np.cumsum(score) * 10 // (score.sum() + 1)


def present_features(
    store: FrameStore, rows: Int64[np.ndarray, "m"], fit: Bool[np.ndarray, "m"]
) -> Float[np.ndarray, "m f"]:
    """Return features of the current timestep: the state, or 32 principal components of a 16x16 frame."""
    if store.state is not None:
        return store.state[rows]
    parts = []
    for part in _batches(len(rows)):
        frames = torch.from_numpy(store.frames[rows[part]]).permute(0, 3, 1, 2).float() / 255
        small = F.adaptive_avg_pool2d(frames, 16) if frames.shape[1] == 3 else frames
        parts.append(small.flatten(1).numpy())
    frames = np.concatenate(parts)
    return principal_components(frames[fit], frames, dims=32)


def _warnings(
    means: dict[str, float], probes: dict[str, dict[str, Any]], health: dict[str, Any] | None
) -> list[str]:
    """Return warnings for the user."""
    recon, copy, shuffled = (means.get(f"{name}_mse", np.nan) for name in ("recon", "copy", "shuffled"))
    found = []
    if shuffled < IGNORED_BELOW * recon or shuffled == 0:
        size = f"only {shuffled / recon:.2f} times as large" if recon > 0 else "no larger"
        found.append(
            f"Latents are not used: with another transition's latent the prediction error is {size}. "
            "The model predicts from past frames alone; use fewer past frames or a larger motion weight."
        )
    if recon >= copy:
        found.append(
            f"Predictions are no better than copying the last frame (error {recon:.2g} against {copy:.2g}); "
            "train longer, or choose a larger frame gap if little moves between two frames."
        )
    if health and health["perplexity"] < max(2, COLLAPSED_BELOW * health["size"]):
        found.append(
            f"Codes collapsed: the model uses about {health['perplexity']:.1f} of {health['size']} codes; "
            "use a smaller codebook, fsq, or a bottleneck without codes."
        )
    if change := probes.get(
        "state_change"
    ):  # a latent action does not contain a position, but possibly its change
        best, floor = change["score"], probes["state_change_state_only"]["score"]
        if best <= floor:
            found.append(
                f"Latents predict the change of the state no better than the state alone: {best:.2f} against "
                f"{floor:.2f}."
            )
    elif probes:
        best = max(probes["latent_linear"]["score"], probes["latent_mlp"]["score"])
        floor = max(probes["state_only"]["score"], probes["shuffled_future"]["score"])
        if best <= floor:
            found.append(
                f"Latents predict the action no better than the floor: {best:.2f} against {floor:.2f}."
            )
    return found
