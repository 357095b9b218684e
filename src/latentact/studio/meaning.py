"""What latent actions mean: the codes or clusters of a dataset's transitions, in words where labels exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, UInt8

from latentact.data.store import FrameStore, known_rows
from latentact.data.windows import Clips
from latentact.errors import UserError
from latentact.evaluation.lam.clusters import cluster
from latentact.evaluation.lam.diagnostics import without_state
from latentact.evaluation.lam.metrics import FEWEST_PROBED, bootstrap_groups, encode_rows, halves_of
from latentact.evaluation.lam.probes import ProbeData, ProbeScore, linear_probe
from latentact.guidance.guide import Guide
from latentact.studio.workspace import BATCH, Work, WorkProgress, Workspace, predict

MOST = 1500
"""Transitions that are encoded."""
MOST_CODES = 24
"""Codes shown one by one; more are clustered."""
CLUSTERS = 8
EXAMPLES = 4
SCENES = 4
SHARE = 0.1
"""Smallest share of an action that is named."""
WEAK = 0.05
"""Gain of the probe over its floor below which words are not to be trusted."""
MOVES = 0.25
"""Smallest mean of an action's dimension that is named, in its standard deviations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """Latent actions of transitions spread over a dataset, in groups; the largest group first."""

    rows: Int64[np.ndarray, " m"]
    """Row in the data of the first frame of each transition."""
    vectors: Float32[np.ndarray, "m k d"]
    episode: Int64[np.ndarray, " m"]
    gap: int
    centers: Float32[np.ndarray, "g k d"]
    codes: tuple[tuple[int, ...], ...] | None
    """Codes of each group; None where groups are clusters."""
    group: Int64[np.ndarray, " m"]
    mean: Float32[np.ndarray, " f"]
    axes: Float32[np.ndarray, "3 f"]
    """Principal axes, scaled so that the standard deviation along each is 1; zeros where there is none."""
    actions: np.ndarray | None
    """Recorded robot actions `[m]` or `[m, a]`, without what the state explains; None without labels."""
    known: Bool[np.ndarray, " m"]
    """Transitions with a recorded action."""
    action_names: tuple[str, ...]
    probe: ProbeScore | None
    """How well a linear probe predicts the action of other episodes from the latent action."""
    floor: float
    """The probe's score without latent actions: the share of the most frequent action, or 0."""

    def nearest(self, vectors: Float32[np.ndarray, "n k d"]) -> Int64[np.ndarray, " n"]:
        """Return the group of each latent action."""
        flat, centers = (each.reshape(len(each), -1) for each in (vectors, self.centers))
        return np.stack([np.square(row - centers).sum(1).argmin() for row in flat]).astype(np.int64)

    def components(self, vectors: Float32[np.ndarray, "n k d"]) -> Float[np.ndarray, "n 3"]:
        """Return the first three principal components, in standard deviations of the dataset."""
        return (vectors.reshape(len(vectors), -1) - self.mean) @ self.axes.T

    def title(self, group: int) -> str:
        """Return the name of a group: its codes, or its number."""
        if self.codes is None:
            return f"cluster {group + 1}"
        return f"code {' '.join(map(str, self.codes[group]))}"

    def words(self, group: int) -> str:
        """Return a group in words of the recorded actions; empty without labels.

        The largest shares of discrete actions, "left 0.8, forward 0.1", or the mean of the dimensions of
        continuous ones in standard deviations of the dataset, "+x 1.2, -y 0.4".
        """
        among = self.known & (self.group == group)
        if self.actions is None or not among.any():
            return ""
        taken = self.actions[among]
        if taken.ndim == 1:
            shares = np.bincount(taken, minlength=len(self.action_names)) / len(taken)
            best = [i for i in np.argsort(-shares, kind="stable")[:3].tolist() if shares[i] >= SHARE]
            return ", ".join(f"{self.action_name(i)} {shares[i]:.1f}" for i in best)
        everywhere = self.actions[self.known]
        mean = (taken.mean(0) - everywhere.mean(0)) / everywhere.std(0).clip(min=1e-9)
        best = [i for i in np.argsort(-np.abs(mean), kind="stable")[:3].tolist() if abs(mean[i]) >= MOVES]
        named = (f"{'+' if mean[i] > 0 else '-'}{self.action_name(i)} {abs(mean[i]):.1f}" for i in best)
        return ", ".join(named) or "no clear direction"

    def action_name(self, index: int) -> str:
        """Return the name of a discrete action, or of a dimension."""
        return self.action_names[index] if index < len(self.action_names) else f"action {index}"

    @property
    def trust(self) -> str:
        """How to read the words and how far they can be trusted; empty without labels."""
        if self.actions is None:
            return ""
        unit = "shares of the recorded actions"
        if self.actions.ndim > 1:
            unit = "means of the recorded actions, in standard deviations"
        if self.probe is None:
            return f"Numbers are {unit}. There are too few labeled transitions to validate them."
        low, high = self.probe.ci95
        what = "accuracy" if self.probe.metric == "accuracy" else "R2"
        found = (
            f"Numbers are {unit}. A linear probe of the latent action predicts the action of other episodes "
            f"with {what} {self.probe.score:.2f} ({low:.2f} to {high:.2f}); without it, {self.floor:.2f}."
        )
        if low <= self.floor + WEAK:
            found += " Latent actions say little about robot actions here, and so do these words."
        return found


def survey(work: Workspace) -> Work[Survey]:
    """Encode transitions of the data and group them by code, or else into clusters.

    Raises:
        UserError: there is no data, or no episode is long enough.
    """
    store, model = work.store, work.model
    if store is None:
        raise UserError("this page needs data, got none. Give --data.")
    gap = work.gap(store.fps)
    clips = Clips(store, episodes=np.arange(store.num_episodes), frame_gap=gap, context=model.context)
    rows = clips.rows[np.unique(np.linspace(0, len(clips) - 1, min(len(clips), MOST)).astype(int))]
    vectors, codes = [], []
    for i in range(0, len(rows), BATCH):
        found, code = encode_rows(model, clips, rows[i : i + BATCH], work.lam.device)
        vectors.append(found.numpy())
        codes += [] if code is None else [code]
        yield WorkProgress(what="encoding the data", done=i + len(found), total=len(rows))
    latents, episode = np.concatenate(vectors), store.episode[rows]
    actions, known = _labels(store, rows)
    probe, floor = _trust(latents, actions, known, episode, rows, gap, model.context)
    described = _described(latents, np.concatenate(codes) if codes else None)
    return Survey(
        **described,
        rows=rows,
        episode=episode,
        gap=gap,
        actions=actions,
        known=known,
        action_names=store.action_names,
        probe=probe,
        floor=floor,
    )


def local_survey(guide: Guide, gap: int) -> Survey:
    """Return the survey of one demonstration alone, where there is no data."""
    return Survey(
        **_described(guide.vectors, guide.codes),
        rows=np.arange(len(guide)),
        episode=np.zeros(len(guide), np.int64),
        gap=gap,
        actions=None,
        known=np.zeros(len(guide), bool),
        action_names=(),
        probe=None,
        floor=0.0,
    )


def _described(vectors: np.ndarray, codes: np.ndarray | None) -> dict[str, Any]:
    """Return the fields of a `Survey` that follow from the latent actions: groups and principal axes."""
    names, group, centers = _groups(vectors, codes)
    flat = vectors.reshape(len(vectors), -1)
    mean = flat.mean(0)
    _, sizes, axes = np.linalg.svd(flat - mean, full_matrices=False)
    scaled = np.zeros((3, flat.shape[1]), np.float32)
    for i in np.flatnonzero(sizes[:3] > 1e-6 * max(sizes[0], 1e-6)):
        scaled[i] = axes[i] * np.sqrt(len(flat)) / sizes[i]
    found = {"vectors": vectors, "codes": names, "group": group, "centers": centers}
    return {**found, "mean": mean, "axes": scaled}


def _groups(
    vectors: Float32[np.ndarray, "m k d"], codes: Int64[np.ndarray, "m k"] | None
) -> tuple[tuple[tuple[int, ...], ...] | None, np.ndarray, np.ndarray]:
    """Return the codes of groups, the group of each transition, and the centers; largest group first."""
    found = None if codes is None else np.unique(codes, axis=0, return_inverse=True)
    if found is not None and len(found[0]) <= MOST_CODES:
        names, group = found[0], found[1].reshape(-1)
    else:
        names, group = None, cluster(vectors.reshape(len(vectors), -1), CLUSTERS)
    order = np.argsort(-np.bincount(group), kind="stable")
    group = np.argsort(order)[group]
    centers = np.stack([vectors[group == g].mean(0) for g in range(len(order))]).astype(np.float32)
    if names is None:
        return None, group, centers if codes is None else _members(vectors, centers)
    return tuple(tuple(map(int, names[i])) for i in order), group, centers


def _members(vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return the latent action nearest to each center, since the mean of codes is no code."""
    return np.stack([vectors[np.square(vectors - each).sum((1, 2)).argmin()] for each in centers])


def _labels(store: FrameStore, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the recorded action of each transition, without what the state explains, and which are known."""
    if store.action_space is None:
        return None, np.zeros(len(rows), bool)
    found = store.actions(range(store.num_episodes))[rows]
    known, taken = known_rows(found), np.ma.getdata(found)
    if taken.ndim > 1 and store.state is not None and known.any():
        taken = without_state(taken, store.state[rows], known)
    return (taken if known.any() else None), known


def _trust(
    latents: np.ndarray,
    actions: np.ndarray | None,
    known: np.ndarray,
    episode: np.ndarray,
    rows: np.ndarray,
    gap: int,
    context: int,
) -> tuple[ProbeScore | None, float]:
    """Return the score of a linear probe, and that without latent actions."""
    if actions is None:
        return None, 0.0
    fit, score = halves_of(episode, rows, gap, context, 0)
    fit, score = fit & known, score & known
    if min(fit.sum(), score.sum()) < FEWEST_PROBED:
        return None, 0.0
    unit, flat = bootstrap_groups(episode, score), latents.reshape(len(latents), -1)
    pair = (ProbeData(features=flat[p], targets=actions[p], episode=unit[p]) for p in (fit, score))
    floor = 0.0
    if actions.ndim == 1:
        floor = float((actions[score] == np.bincount(actions[fit]).argmax()).mean())
    return linear_probe(*pair), floor


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """Frames of one group."""

    now: UInt8[np.ndarray, "n h w 3"]
    """First frames of its most typical transitions, each of another episode if possible."""
    next: UInt8[np.ndarray, "n h w 3"]
    scenes: UInt8[np.ndarray, "s h w 3"]
    """Frames of other scenes; the same for all groups."""
    transfer: UInt8[np.ndarray, "s h w 3"] | None
    """What forward dynamics predicts for the group's latent action there; None for a LAM without it."""


def galleries(work: Workspace, found: Survey) -> Work[list[Gallery]]:
    """Return examples of each group, and its latent action applied to other scenes."""
    store, model = work.store, work.model
    assert store is not None
    clips = Clips(store, episodes=np.arange(store.num_episodes), frame_gap=found.gap, context=model.context)
    spread = np.linspace(0, len(found.rows) - 1, SCENES + 2).astype(int)[1:-1]
    scenes = clips.clip(found.rows[spread]).frames[:, :-1]
    shown = []
    for group in range(len(found.centers)):
        members = np.flatnonzero(found.group == group)
        distance = np.square(found.vectors[members] - found.centers[group]).sum((1, 2))
        members = members[np.argsort(distance, kind="stable")]
        _, first = np.unique(found.episode[members], return_index=True)
        members = members[[*np.sort(first), *np.setdiff1d(np.arange(len(members)), first)][:EXAMPLES]]
        rows = found.rows[members]
        transfer = None
        if model.generative:
            transfer = predict(model, scenes, found.centers[[group] * len(scenes)])
        shown.append(
            Gallery(
                now=np.array(store.frames[rows]),
                next=np.array(store.frames[rows + found.gap]),
                scenes=scenes[:, -1].permute(0, 2, 3, 1).numpy(),
                transfer=transfer,
            )
        )
        yield WorkProgress(what="collecting examples", done=group + 1, total=len(found.centers))
    return shown
