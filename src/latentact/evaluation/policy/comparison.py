"""Compare methods on the same labels, seeds and episodes, and determine the winner.

Methods with k labeled episodes are `latent`, `latent_joint` (the LAM learns from the labels, too), `bc_k` and
`idm_k`; `oracle` is BC on all labels (its k is None). `*_finetuned` and `*_self_training` add the training
that the latent policy gets after grounding, so that all have the same number of updates. `vla` is a
vision-language-action model that first learns latent actions, `vla_scratch` the same without that,
`vla_oracle` the same on all labels.
`act_k`, `diffusion_k` and `lam_act_k` are policies of LeRobot. `uniform` and `frequencies` ignore
observations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentact.agents.blind import BLIND
from latentact.evaluation.policy.intervals import success_interval

LATENT = ("latent", "latent_finetuned", "latent_joint", "vla", "lam_act_k")
BASELINES = (
    *("bc_k", "bc_k_finetuned", "bc_k_self_training", "idm_k", "idm_k_finetuned", "vla_scratch"),
    *("act_k", "diffusion_k"),
)
LIMITED = (*LATENT, *BASELINES)
ORACLES = {"oracle": "the oracle, BC on all labels", "vla_oracle": "the oracle VLA, trained on all labels"}
METHODS = {
    "latent": "Latent policy",
    "latent_decoder_only": "Latent policy, decoder only",
    "latent_finetuned": "Latent policy, fine-tuned on k labels",
    "latent_joint": "Latent policy with joint head",
    "latent_joint_decoder_only": "Latent, joint head, decoder only",
    "vla": "VLA pretrained on latent actions",
    "bc_k": "BC on k labels",
    "bc_k_finetuned": "BC on k labels, fine-tuned",
    "bc_k_self_training": "BC on k labels, self-training",
    "idm_k": "IDM on k labels",
    "idm_k_finetuned": "IDM on k labels, fine-tuned",
    "vla_scratch": "VLA on k labels, not pretrained",
    "act_k": "ACT on k labels (LeRobot)",
    "diffusion_k": "Diffusion Policy on k labels (LeRobot)",
    "lam_act_k": "ACT with LAM tokens on k labels (LeRobot)",
    "oracle": "Oracle BC (all labels)",
    "oracle_finetuned": "Oracle BC, fine-tuned",
    "vla_oracle": "Oracle VLA (all labels)",
    "uniform": "Uniformly random actions",
    "frequencies": "Random actions of the data",
}

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Rollout of one method at one k and one seed."""

    method: str
    """A key of `METHODS`."""
    k: int | None
    """Labeled episodes; None for all of them."""
    seed: int
    """Seed of training."""
    episodes: int
    """Number of episodes."""
    success: float | None
    """Fraction of successful episodes; None if the environment reports no success."""
    mean_return: float
    """Mean return, the sum of rewards ("return" in files)."""
    ci95: Interval | None
    """95 % interval of the success."""
    return_ci95: Interval
    """95 % interval of the return."""
    successes: tuple[bool, ...] = ()
    """Success of every episode."""
    run: str = ""
    """Folder of the rollout, relative to the comparison's."""
    updates: int | None = None
    """Updates of the policy, including fine-tuning; None in comparisons of older releases."""
    decoder_only: Mapping[str, Any] | None = None
    """Of fine-tuned latent methods: success, return and ci95 before fine-tuning."""

    def to_json(self) -> dict[str, Any]:
        """Return the row of `comparison.json`."""
        row: dict[str, Any] = {
            "method": self.method,
            "k": self.k,
            "seed": self.seed,
            "episodes": self.episodes,
            "success": self.success,
            "return": self.mean_return,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "return_ci95": list(self.return_ci95),
            "successes": [int(success) for success in self.successes],
            "run": self.run,
        }
        if self.updates is not None:
            row["updates"] = self.updates
        return row if self.decoder_only is None else {**row, "decoder_only": dict(self.decoder_only)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        """Return the row of `comparison.json`, or of a `rollout.json` with method, k, seed and run added."""
        mean_return = float(row["return"])
        return cls(
            method=row["method"],
            k=row["k"],
            seed=row["seed"],
            episodes=row["episodes"],
            success=None if row["success"] is None else float(row["success"]),
            mean_return=mean_return,
            ci95=_interval(row.get("ci95")),
            return_ci95=_interval(row.get("return_ci95")) or (mean_return, mean_return),
            successes=tuple(bool(success) for success in row.get("successes") or ()),
            run=row.get("run", ""),
            updates=row.get("updates"),
            decoder_only=row.get("decoder_only"),
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """Results of one method at one k, over all seeds."""

    method: str
    """A key of `METHODS`."""
    k: int | None
    """Labeled episodes; None for all of them."""
    seeds: int
    """Number of training seeds."""
    episodes: int
    """Number of episodes over all seeds."""
    success: float | None
    """Fraction of successful episodes."""
    ci95: Interval | None
    """Wilson interval over all episodes."""
    mean_return: float
    """Mean return over all episodes."""
    return_ci95: Interval
    """95 % interval of the mean return."""
    per_seed: tuple[float, ...]
    """Success (return, if the environment reports no success) of every seed."""
    updates: int | None = None
    """Updates of the policy, including fine-tuning; None if the rows lack it."""

    @property
    def label(self) -> str:
        """Display name of the method."""
        return METHODS.get(self.method, self.method)

    @property
    def score(self) -> float:
        """Score by which methods are ranked: success, or return if success is not reported."""
        return self.mean_return if self.success is None else self.success

    @property
    def interval(self) -> Interval:
        """95 % interval of the score."""
        return self.return_ci95 if self.ci95 is None else self.ci95


def aggregate(rows: Iterable[Row]) -> list[Result]:
    """Pool the seeds of every method and k; ordered by k, then as in `METHODS`, the oracle last."""
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.k), []).append(row)
        if row.decoder_only is not None:
            before = f"{row.method}_decoder_only"
            groups.setdefault((before, row.k), []).append(_decoder_only(row, before))
    order = list(METHODS)

    def rank(result: Result) -> tuple[float, int]:
        known = order.index(result.method) if result.method in METHODS else len(order)
        return (math.inf if result.k is None else float(result.k), known)

    return sorted((_pool(group) for group in groups.values()), key=rank)


def verdict(rows: Iterable[Row]) -> str:
    """Return the winner among methods with k labels, its margin and intervals, and the gap to the oracle.

    The first sentence names the winner, even if it is a baseline.
    """
    results = aggregate(rows)
    ks = sorted({r.k for r in results if r.k is not None and r.method in LIMITED})
    if not ks:
        return "There is no method with k labels to compare."
    ranked = {
        k: sorted((r for r in results if r.k == k and r.method in LIMITED), key=lambda r: -r.score)
        for k in ks
    }
    overall = [_overall(ranked)] if len(ks) > 1 else []
    details = [sentence for k in ks for sentence in (*_sentences(ranked[k]), *_sources(results, k))]
    oracles = [r for r in results if r.method in ORACLES]
    blind = max((r for r in results if r.method in BLIND), key=lambda r: r.score, default=None)
    floor = [] if blind is None else [_above(blind, [r for k in ks for r in ranked[k]])]
    return " ".join([*overall, *details, *(_from_oracle(ranked[ks[-1]][0], r) for r in oracles), *floor])


def _interval(values: Sequence[float | int] | None) -> Interval | None:
    return None if values is None else (float(values[0]), float(values[1]))


def _decoder_only(row: Row, method: str) -> Row:
    """Return a latent row before fine-tuning as a row of its own, with the same number of episodes."""
    plain = row.decoder_only or {}
    mean_return = float(plain["return"])
    return replace(
        row,
        method=method,
        success=plain.get("success"),
        mean_return=mean_return,
        ci95=_interval(plain.get("ci95")),
        return_ci95=_interval(plain.get("return_ci95")) or (mean_return, mean_return),
        successes=(),
        updates=None,
        decoder_only=None,
    )


def _pool(rows: Sequence[Row]) -> Result:
    episodes = sum(row.episodes for row in rows)
    mean_return = sum(row.mean_return * row.episodes for row in rows) / episodes
    # Seeds are independent, so the variances of their means add up.
    halves = [row.episodes / episodes * (row.return_ci95[1] - row.return_ci95[0]) / 2 for row in rows]
    spread = math.hypot(*halves)
    has_success = all(row.success is not None for row in rows)
    won = round(sum((row.success or 0) * row.episodes for row in rows))
    return Result(
        method=rows[0].method,
        k=rows[0].k,
        seeds=len(rows),
        episodes=episodes,
        success=won / episodes if has_success else None,
        ci95=_interval(success_interval([True] * won + [False] * (episodes - won))) if has_success else None,
        mean_return=mean_return,
        return_ci95=rows[0].return_ci95 if len(rows) == 1 else (mean_return - spread, mean_return + spread),
        per_seed=tuple(row.mean_return if row.success is None else row.success for row in rows),
        updates=rows[0].updates,
    )


def _number(result: Result) -> str:
    low, high = result.interval
    return f"{result.score:.2f} ({low:.2f} to {high:.2f})"


def _labeled(k: int | None) -> str:
    return f"{k} labeled episode{'' if k == 1 else 's'}"


def _winner(ranked: Sequence[Result]) -> str | None:
    """Return the label of the winner at one k; None if methods tie or none ever succeeds."""
    first = ranked[0]
    if first.success == 0 or (len(ranked) > 1 and ranked[1].score == first.score):
        return None
    return first.label


def _sentences(ranked: Sequence[Result]) -> list[str]:
    """Compare the winner at one k with the runner-up, and with the best method of the other kind."""
    first, measure = ranked[0], "return" if ranked[0].success is None else "success"
    if len(ranked) == 1:
        return [
            f"{first.label} with {_labeled(first.k)} reaches {measure} {_number(first)}; nothing to compare."
        ]
    if first.success == 0:
        return [f"No method wins with {_labeled(first.k)}: none ever succeeds in {first.episodes} episodes."]
    second = ranked[1]
    if _winner(ranked) is None:
        tied = " and ".join(r.label for r in ranked if r.score == first.score)
        return [f"{tied} tie with {_labeled(first.k)}: {measure} {_number(first)} each."]
    sentences = [
        f"{first.label} wins with {_labeled(first.k)}: {measure} {_number(first)} against {_number(second)} "
        f"for {second.label}, the next best; {_certain(first, second)}."
    ]
    family = first.method in LATENT
    other = next((r for r in ranked if (r.method in LATENT) is not family), None)
    if other is not None and other is not second:
        kind = "baseline" if family else "latent policy"
        sentences.append(
            f"The best {kind}, {other.label}, reaches {_number(other)}; {_certain(first, other)}."
        )
    return sentences


def _sources(results: Sequence[Result], k: int) -> list[str]:
    """Return sentences on where the gain comes from, and what baselines gain from as many updates."""
    at = {r.method: r for r in results if r.k == k}
    sentences = []
    if "vla" in at and "vla_scratch" in at:
        sentences.append(
            f"At equal steps of fine-tuning, latent actions of the video take the VLA from "
            f"{at['vla_scratch'].score:.2f} to {at['vla'].score:.2f}; "
            f"{_certain(at['vla'], at['vla_scratch'])}."
        )
    if "latent" not in at or "latent_decoder_only" not in at:
        return sentences
    parts = [f"{at['latent_decoder_only'].score:.2f} with the decoder only"]
    if "latent_finetuned" in at:
        parts.append(f"{at['latent_finetuned'].score:.2f} with fine-tuning on the k episodes")
        parts.append(f"{at['latent'].score:.2f} with self-training")
    else:
        parts.append(f"{at['latent'].score:.2f} fine-tuned")
    sentences.append(f"{at['latent'].label}: {', '.join(parts)}.")
    gains = [
        f"{at[base].label} goes from {at[base].score:.2f} to {at[more].score:.2f} with {how}"
        for base, more, how in (
            ("bc_k", "bc_k_finetuned", "fine-tuning"),
            ("bc_k", "bc_k_self_training", "self-training"),
            ("idm_k", "idm_k_finetuned", "fine-tuning"),
        )
        if base in at and more in at
    ]
    if gains:
        sentences.append(f"At the same number of updates, {' and '.join(gains)}.")
    return sentences


def _certain(first: Result, second: Result) -> str:
    if first.interval[0] > second.interval[1] or second.interval[0] > first.interval[1]:
        return "the intervals do not overlap"
    return "the intervals overlap, so more episodes or seeds could change the order"


def _overall(ranked: Mapping[int, Sequence[Result]]) -> str:
    """Return one sentence with the winner at each of several k."""
    at: dict[str, list[str]] = {}
    for k, results in ranked.items():
        at.setdefault(_winner(results) or "no single method", []).append(str(k))
    if len(at) == 1:
        (name,) = at
        return f"{name[0].upper()}{name[1:]} wins at every k ({', '.join(at[name])})."
    places = ", ".join(f"{name} at k = {' and '.join(ks)}" for name, ks in at.items())
    return f"The winner depends on k: {places}."


def _above(blind: Result, results: Sequence[Result]) -> str:
    """Return the score of an agent that ignores observations, and the methods that do not beat it."""
    name = f"{blind.label[0].lower()}{blind.label[1:]}"
    below = [f"{r.label} ({_labeled(r.k)})" for r in results if r.score <= blind.score]
    sentence = f"Without observations, {name} reach {_number(blind)}"
    return f"{sentence}; no better than that: {', '.join(below)}." if below else f"{sentence}."


def _from_oracle(winner: Result, oracle: Result) -> str:
    """Return the distance from the best method at the largest k to training on all labels."""
    name, reached = ORACLES[oracle.method], _number(oracle)
    if oracle.score <= 0:
        return f"{name[0].upper()}{name[1:]}, reaches only {reached}, so it sets no ceiling here."
    ratio = winner.score / oracle.score
    scored = f"scores {ratio:.0%} of" if ratio < 1 else "is at least as good as"
    return f"The best method with {_labeled(winner.k)} {scored} {name}, which reaches {reached}."
