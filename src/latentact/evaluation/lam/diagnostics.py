"""Diagnostics of latent action models: pure functions of latents, frames and actions.

S-PCFC is from CoMo (arXiv 2505.17006), additivity and reversal from ALAM (arXiv 2605.10819), delta PSNR from
Genie (arXiv 2402.15391). The lag curve finds actions that are recorded one or more rows too early or too
late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.evaluation.lam.probes import ProbeData, ProbeScore, linear_probe

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64, Shaped

DRAWS = 3  # of the k labeled episodes, for every k of the label-efficiency curve
SMALLEST_MSE = 1e-6  # a PSNR of 60 dB: smaller errors do not matter
LEAD = 0.05  # margin by which another lag must beat the expected one to count as better
TELLING = 0.25  # R2 below which the lag curve of continuous actions is too flat to find the lag


def spread(latents: Float[np.ndarray, "n f"]) -> float:
    """Return how much latents vary: standard deviation over magnitude; 0: all are the same."""
    size = np.sqrt(np.square(latents).sum(1).mean())
    deviation = np.sqrt(np.square(latents - latents.mean(0)).sum(1).mean())
    return float(deviation / size) if size > 0 else 0.0


def effective_dims(latents: Float[np.ndarray, "n f"]) -> float:
    """Return the effective number of dimensions of latents: participation ratio of their variances, 0..f."""
    variance = np.square(np.linalg.svd(latents - latents.mean(0), compute_uv=False))
    return float(variance.sum() ** 2 / np.square(variance).sum()) if variance.any() else 0.0


def relative_error(error: Float[np.ndarray, "n f"], reference: Float[np.ndarray, "n f"]) -> float:
    """Return the mean norm of `error` over that of `reference`; 0 if both are 0."""
    length, scale = (np.linalg.norm(each, axis=1).mean() for each in (error, reference))
    return float(length / scale) if scale > 0 else 0.0


def algebra(
    ab: Float[np.ndarray, "n f"],
    bc: Float[np.ndarray, "n f"],
    ac: Float[np.ndarray, "n f"],
    ba: Float[np.ndarray, "n f"],
    aa: Float[np.ndarray, "n f"],
) -> dict[str, float]:
    """Return how far latents are from being additive like motions; 0 is exact.

    Args:
        ab: latents from timestep a to timestep b; c is as far after b as b is after a.
        bc: latents from b to c.
        ac: latents from a to c.
        ba: latents from b back to a.
        aa: latents from a to a itself.
    """
    return {
        "additivity": relative_error(ac - ab - bc, ac),
        "reversal": relative_error(ab + ba, ab),
        "identity": relative_error(aa, ab),
    }


def mean_cosine(a: Float[np.ndarray, "n f"], b: Float[np.ndarray, "n f"]) -> float:
    """Return the mean cosine between the rows of two arrays; rows of zeros count as 0."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.where(lengths > 0, (a * b).sum(1) / np.maximum(lengths, 1e-12), 0.0).mean())


def past_future_cosine(past: Float[np.ndarray, "n f"], future: Float[np.ndarray, "n f"]) -> dict[str, float]:
    """Return the cosine between the latents that lead to the same frame from its past and from its future.

    Near 1, a latent encodes the appearance of the next frame, not the motion. `s_pcfc` is the plain cosine as
    published; `centered` subtracts the mean latent first.
    """
    mean = np.concatenate([past, future]).mean(0)
    return {"s_pcfc": mean_cosine(past, future), "centered": mean_cosine(past - mean, future - mean)}


def future_dependence(
    own: Float[np.ndarray, "n f"], wrong: Float[np.ndarray, "n f"], others: Float[np.ndarray, "n f"]
) -> float:
    """Return the change of latents by a wrong future, relative to distances between transitions."""
    return relative_error(wrong - own, others - own)


def psnr(mse: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Return peak signal to noise ratios in dB, at most 60, from squared errors on a 0..1 scale."""
    return -10 * np.log10(np.maximum(mse, SMALLEST_MSE))


def delta_psnr(own: Float[np.ndarray, "n t"], other: Float[np.ndarray, "n t"]) -> list[float]:
    """Return the PSNR gain (dB) of frames rolled out with their own latents over others', per step.

    Args:
        own: squared errors (0..1 scale) of frames rolled out with the latents of the video.
        other: squared errors with latents of another video.
    """
    return [float(step) for step in (psnr(own) - psnr(other)).mean(0)]


def share_inside(
    response: Float[np.ndarray, "n g g"], moving: Bool[np.ndarray, "n g g"]
) -> tuple[float, float]:
    """Return the share of the response in moving cells, and the share of cells that move."""
    total = response.sum()
    return float((response * moving).sum() / total) if total > 0 else 0.0, float(moving.mean())


def without_state(
    actions: Float[np.ndarray, "n a"], state: Float[np.ndarray, "n s"], fit: Bool[np.ndarray, "n"]
) -> Float[np.ndarray, "n a"]:
    """Return the residual of actions after a linear fit on the state of the same row.

    Where actions are target positions, they mostly equal the current position; the residual is the motion.
    Rows that are not finite stay so and do not affect the fit.
    """
    known = fit & np.isfinite(actions).all(1)
    inputs = np.concatenate([state, np.ones((len(state), 1), state.dtype)], axis=1).astype(np.float64)
    weights, *_ = np.linalg.lstsq(inputs[known], actions[known].astype(np.float64), rcond=None)
    return actions - inputs @ weights


def lag_curve(
    latents: Float[np.ndarray, "n f"],
    targets: dict[int, Shaped[np.ndarray, "n *a"]],
    fit: Bool[np.ndarray, "n"],
    score: Bool[np.ndarray, "n"],
    group: Int64[np.ndarray, "n"],
    seed: int,
) -> dict[int, ProbeScore]:
    """Return the probe score of the action at every lag in rows; it should peak at 0.

    Args:
        latents: one latent per transition.
        targets: lag -> the action recorded that many rows after the transition's first frame.
        fit: transitions on which the probe is fitted.
        score: transitions on which it is scored.
        group: bootstrap unit of each transition.
        seed: seed of the bootstrap.
    """
    return {
        lag: linear_probe(
            *(
                ProbeData(features=latents[part], targets=target[part], episode=group[part])
                for part in (fit, score)
            ),
            seed=seed,
        )
        for lag, target in targets.items()
    }


def misaligned(curve: dict[int, ProbeScore], gap: int) -> int | None:
    """Return the lag at which actions fit clearly better than within the transition; None if there is none.

    Args:
        curve: result of `lag_curve`.
        gap: rows that a transition spans; the action at any of them may match.
    """
    inside = max((curve[lag] for lag in curve if 0 <= lag < gap), key=lambda probe: probe.score)
    peak = max(curve, key=lambda lag: curve[lag].score)
    best = curve[peak]
    clear = best.score > inside.score + LEAD and best.ci95[0] > inside.ci95[1]
    if best.metric == "r2" and best.score < TELLING:
        return None
    return peak if clear and not 0 <= peak < gap else None


def label_efficiency(
    fit: ProbeData, score: ProbeData, floor_fit: ProbeData, floor_score: ProbeData, seed: int
) -> list[dict[str, Any]]:
    """Return the scores of a linear probe and of its floor with the labels of 1, 2, 4, ... episodes.

    Both use the same few draws of episodes for every k, and those of a smaller k are a subset of those of a
    larger one; `low` and `high` are the worst and the best draw.

    Args:
        fit: latents to draw labeled episodes from.
        score: latents of other episodes.
        floor_fit: features of the same transitions as `fit`, without latents.
        floor_score: features of the same transitions as `score`, without latents.
        seed: seed of the draws.
    """
    present = np.unique(fit.episode)
    orders = [np.random.default_rng((seed, draw)).permutation(present) for draw in range(DRAWS)]
    ks = [2**i for i in range(len(present).bit_length()) if 2**i < len(present)] + [len(present)]
    curve: list[dict[str, Any]] = []
    for k in ks:
        row: dict[str, Any] = {"k": int(k)}
        for name, learn, evaluate in (("latent", fit, score), ("floor", floor_fit, floor_score)):
            reached = [_with_labels(learn, evaluate, order[:k], seed) for order in orders]
            row[name] = {"score": float(np.mean(reached)), "low": min(reached), "high": max(reached)}
        curve.append(row)
    return curve


def _with_labels(fit: ProbeData, score: ProbeData, episodes: np.ndarray, seed: int) -> float:
    part = np.isin(fit.episode, episodes)
    known = ProbeData(features=fit.features[part], targets=fit.targets[part], episode=fit.episode[part])
    return linear_probe(known, score, seed=seed).score
