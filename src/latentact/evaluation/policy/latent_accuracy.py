"""Accuracy of latent actions predicted by a vision-language-action model, with model-free baselines.

Codes are scored by accuracy, latent actions without codes by R2. Codes are often easy to guess: the majority
code, that of the task, or the previous one can be as accurate as a large model. Shuffled images and a blank
prompt show whether the model uses the image and the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Shaped

from latentact.policies.vla.model import Vla
from latentact.policies.vla.samples import VlaSamples

BASELINES = {
    "majority": "the most frequent latent action",
    "majority_of_task": "the most frequent latent action of the task",
    "previous": "the previous latent action",
}
"""Baseline without a model -> display name."""
CONTROLS = {"shuffled_images": "with images of other steps", "blank_prompt": "without the task text"}
_MARGIN = 0.01
_BATCH = 64


@torch.no_grad()
def evaluate_latents(
    model: Vla, samples: VlaSamples, rows: np.ndarray, train: np.ndarray, *, complete: bool = True
) -> dict[str, Any]:
    """Return scores on held-out rows.

    Args:
        model: the model, in evaluation mode.
        samples: data of the rows.
        rows: held-out rows with a latent action.
        train: training rows with a latent action, for the baselines.
        complete: whether to add baselines and controls.

    Returns:
        `metric` (accuracy or r2), `score`, for codes also `exact` (all k correct), `nats` (cross-entropy per
        code) and `by_position`; when complete `baselines` and `controls` by name and `verdict`.
    """
    codes = model.latent.codebook_size is not None
    truth = samples.latent[rows]
    predicted, nats = _predict(model, samples, rows)
    numbers: dict[str, Any] = {"metric": "accuracy" if codes else "r2", "rows": len(rows)}
    numbers["score"] = _score(predicted, truth, samples.latent[train])
    if codes:
        right = predicted == truth
        numbers |= {"exact": float(right.all(1).mean()), "nats": nats}
        numbers["by_position"] = right.mean(0).tolist()
    if not complete:
        return numbers
    guesses = _guesses(samples, rows, train, model.latent.frame_gap)
    numbers["baselines"] = {n: _score(g, truth, samples.latent[train]) for n, g in guesses.items()}
    other = np.random.default_rng(0).permutation(rows)
    changed: dict[str, dict[str, Any]] = {
        "shuffled_images": {"images": other},
        "blank_prompt": {"tasks": [""] * len(rows)},
    }
    numbers["controls"] = {
        name: _score(_predict(model, samples, rows, **change)[0], truth, samples.latent[train])
        for name, change in changed.items()
    }
    numbers["verdict"] = verdict(numbers, tasks=len(np.unique(samples.store.task[rows])))
    return numbers


def verdict(numbers: dict[str, Any], tasks: int) -> str:
    """Return the score of the model, or a baseline that is as good, and the inputs that the model ignores."""
    metric, score = {"accuracy": "accuracy", "r2": "R2"}[numbers["metric"]], numbers["score"]
    name, best = max(numbers["baselines"].items(), key=lambda item: item[1])
    if best >= score:
        first = (
            f"A baseline wins: {BASELINES[name]} reaches {metric} {best:.3f} on held-out episodes, the model "
            f"{score:.3f}."
        )
    else:
        first = (
            f"The model predicts latent actions of held-out episodes with {metric} {score:.3f}; the best "
            f"baseline, {BASELINES[name]}, reaches {best:.3f}."
        )
    sentences = [first]
    if numbers["controls"]["shuffled_images"] >= score - _MARGIN:
        sentences.append("It does not use the image.")
    if tasks > 1 and numbers["controls"]["blank_prompt"] >= score - _MARGIN:
        sentences.append("It does not use the task text.")
    return " ".join(sentences)


def table(numbers: dict[str, Any]) -> str:
    """Return the scores as lines of text, the model first."""
    rows = {"model": numbers["score"], **numbers["baselines"], **numbers["controls"]}
    lines = [f"{name.replace('_', ' '):18s} {numbers['metric']} {value:.3f}" for name, value in rows.items()]
    if "exact" in numbers:
        positions = ", ".join(f"{value:.3f}" for value in numbers["by_position"])
        lines[0] += (
            f" (all codes {numbers['exact']:.3f}; by position {positions}; {numbers['nats']:.3f} nats)"
        )
    return "\n".join(lines)


def _predict(
    model: Vla,
    samples: VlaSamples,
    rows: np.ndarray,
    images: np.ndarray | None = None,
    tasks: list[str] | None = None,
) -> tuple[Shaped[np.ndarray, "n k *d"], float]:
    """Return decoded latent actions, and the mean cross-entropy of the true codes (0 without codes)."""
    device = model.own.latent_head.weight.device
    parts, nats = [], 0.0
    for part in _slices(len(rows)):
        batch = samples.batch(
            rows[part],
            images=None if images is None else images[part],
            tasks=None if tasks is None else tasks[part],
        ).to(device)
        parts.append(model.decode(batch.inputs, batch.state).numpy(force=True))
        if model.latent.codebook_size is not None and images is None and tasks is None:
            logits = model.code_logits(batch.inputs, batch.state, batch.latent[:, :-1])
            nats += F.cross_entropy(logits.flatten(0, 1), batch.latent.flatten(), reduction="sum").item()
    return np.concatenate(parts), nats / (len(rows) * model.latent.tokens)


def _slices(count: int) -> Iterator[slice]:
    yield from (slice(start, start + _BATCH) for start in range(0, count, _BATCH))


def _score(predicted: np.ndarray, truth: np.ndarray, train: np.ndarray) -> float:
    """Return the mean accuracy of codes, or R2 against the mean of the training data."""
    if truth.dtype.kind == "i":
        return float((predicted == truth).mean())
    return float(1 - np.square(predicted - truth).sum() / np.square(train.mean(0) - truth).sum().clip(1e-12))


def _guesses(samples: VlaSamples, rows: np.ndarray, train: np.ndarray, gap: int) -> dict[str, np.ndarray]:
    """Return the prediction of each baseline."""
    store, latent = samples.store, samples.latent
    usual = _typical(latent[train])
    by_task = np.repeat(usual[None], len(store.task_texts), axis=0)
    for task in np.unique(store.task[train]):
        by_task[task] = _typical(latent[train[store.task[train] == task]])
    before = rows - gap
    known = (before >= 0) & (store.episode[before] == store.episode[rows]) & samples.valid[before]
    shape = (-1, *(1,) * (latent.ndim - 1))
    return {
        "majority": np.repeat(usual[None], len(rows), axis=0),
        "majority_of_task": by_task[store.task[rows]],
        "previous": np.where(known.reshape(shape), latent[before], usual[None]),
    }


def _typical(latent: Shaped[np.ndarray, "n k *d"]) -> Shaped[np.ndarray, "k *d"]:
    """Return the most frequent code of each position, or the mean."""
    if latent.dtype.kind != "i":
        return latent.mean(0)
    return np.stack([np.bincount(column).argmax() for column in latent.T])
