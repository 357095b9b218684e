"""Inspect a latent action model: the metrics of `evaluate_lam`, further probes, diagnostics and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latentact.data.windows import Clips
from latentact.evaluation.lam import diagnostics
from latentact.evaluation.lam.inspect_model import (
    Case,
    algebra,
    controllability,
    gap_curve,
    leakage,
    saliency,
)
from latentact.evaluation.lam.inspect_probes import Probed
from latentact.evaluation.lam.metrics import derangement, encode_rows, evaluate_lam, other_future
from latentact.evaluation.lam.verdict import interpret

if TYPE_CHECKING:
    from collections.abc import Collection

    from jaxtyping import Float

    from latentact.data.store import FrameStore
    from latentact.lams.contract import LatentActionModel

MAP_POINTS = 1500


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Result of an inspection."""

    numbers: dict[str, Any]
    """Content of `inspect.json`: metrics, verdict, and notes on missing metrics."""
    arrays: dict[str, np.ndarray]
    """Arrays for the page: latents, their map, images."""


@torch.no_grad()
def inspect_lam(
    model: LatentActionModel,
    store: FrameStore,
    *,
    episodes: Collection[int] | np.ndarray,
    frame_gap: int,
    seed: int = 0,
    max_transitions: int = 2048,
    device: str = "cpu",
) -> Inspection:
    """Inspect `model` on held-out `episodes`; arguments as in `evaluate_lam`.

    Raises:
        UserError: no episode is long enough for one transition, or latents are not finite.
    """
    model.eval()
    base = evaluate_lam(
        *(model, store),
        episodes=episodes,
        frame_gap=frame_gap,
        seed=seed,
        max_transitions=max_transitions,
        device=device,
    )
    latents, rows = base.arrays["vectors"], base.arrays["row"]
    case = Case(
        model=model,
        store=store,
        episodes=np.asarray(list(episodes)),
        gap=frame_gap,
        seed=seed,
        device=device,
        rows=rows,
    )
    clips = Clips(store, episodes=case.episodes, frame_gap=frame_gap, context=model.context)
    rng = np.random.default_rng((seed, 1))
    futures = other_future(store, rows, frame_gap, rng)
    wrong = encode_rows(model, clips, rows, device, futures=futures)[0].flatten(1).numpy()
    probed = Probed(case, latents, wrong, base.numbers["probes"])
    errors = {f"{name}_mse": base.numbers.get(f"{name}_mse") for name in ("recon", "copy", "shuffled")}
    control = controllability(case) if model.generative and case.rgb else None
    case.missing.extend(_limits(model, base.numbers))
    numbers: dict[str, Any] = {
        "latents": {
            "dims": latents.shape[1],
            "spread": diagnostics.spread(latents),
            "effective_dims": diagnostics.effective_dims(latents),
            "future_dependence": diagnostics.future_dependence(
                latents, wrong, latents[derangement(len(rows), rng)]
            ),
        },
        "probes": probed.probes,
        "label_efficiency": probed.label_efficiency(),
        "lags": probed.lags(),
        "misaligned": probed.misaligned(),
        "codebook": base.numbers["codebook"],
        "reconstruction": errors if model.generative else None,
        "prediction_change": control.pop("prediction_change") if control else None,
        "controllability": control,
        "algebra": algebra(case),
        "leakage": leakage(case, rng),
        "gaps": gap_curve(case),
        "saliency": saliency(case, base.arrays) if case.rgb and model.uses_images else None,
        "uses_images": model.uses_images,
        "action_names": list(store.action_names),
        "transitions": len(rows),
        "episodes": base.numbers["episodes"],
    }
    arrays = {**base.arrays, **_maps(latents, seed, case.missing)}
    numbers |= {"missing": case.missing, "verdict": interpret(numbers).to_json()}
    return Inspection(numbers=numbers, arrays=arrays)


def _limits(model: LatentActionModel, numbers: dict[str, Any]) -> list[str]:
    """Return a sentence for each property of model and data that leaves something out."""
    found = []
    if not model.generative:
        found.append("The model predicts no frames, so reconstruction and control are not evaluated.")
    if not model.uses_images:
        found.append("The model uses robot states only, so saliency is not evaluated.")
    if numbers["episodes"] == 1:
        found.append(
            "There is only one evaluation episode: probes are fitted on its beginning and scored on its end, "
            "and intervals do not cover other episodes."
        )
    if numbers["codebook"] is None:
        found.append("The model has no codes, so no codebook is evaluated.")
    return found


def _maps(latents: Float[np.ndarray, "n f"], seed: int, missing: list[str]) -> dict[str, np.ndarray]:
    """Return the UMAP coordinates of latents, if UMAP is installed; the page computes the PCA."""
    shown = np.unique(np.linspace(0, len(latents) - 1, min(len(latents), MAP_POINTS)).astype(int))
    try:
        from umap import UMAP
    except ModuleNotFoundError:
        missing.append(
            "UMAP is not installed, so only PCA is shown; install it with: pip install 'latentact[umap]'."
        )
        return {"shown": shown}
    if len(shown) < 20 or diagnostics.effective_dims(latents) == 0:
        return {"shown": shown}
    places = UMAP(random_state=seed, n_jobs=1, init="pca").fit_transform(latents[shown])
    return {"shown": shown, "umap": np.asarray(places, np.float32)}
