"""Sections of a report on a latent action model: each returns its part of the page, or why it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentact.reporting.charts import codebook_usage, latent_map
from latentact.reporting.html import Section, bars, chart, figure, image, scroll, table, text, tiles
from latentact.reporting.run_data import LamRun

if TYPE_CHECKING:
    import numpy as np

PROBES = {
    "latent_linear": ("Latent action, linear probe", "Read by a linear model."),
    "latent_mlp": ("Latent action, small network", "Read by an MLP with two hidden layers."),
    "state_only": (
        "Floor: the present alone",
        "Without a latent: only the state, or the current frame. What an expert does next can often be "
        "guessed from it.",
    ),
    "shuffled_future": (
        "Control: shuffled future",
        "Latents of the same timestep with a wrong next frame: information other than the change.",
    ),
    "state_change": (
        "Latent action to displacement",
        "Displacement of the robot's state, read by a linear model.",
    ),
    "state_change_state_only": (
        "Floor: present to displacement",
        "The same without a latent.",
    ),
}
CONTROLS = ("state_only", "shuffled_future", "state_change_state_only")
FIRST = ' class="first"'


def lam_section(lam: LamRun) -> Section:
    """Return the section with the metrics of the latent action model."""
    recon, copy, shuffled = (lam.numbers[f"{name}_mse"] for name in ("recon", "copy", "shuffled"))
    items = [("Error of the predicted frame", f"{recon:.2g}", "mean squared, pixels from 0 to 1")]
    if copy > 0:
        items.append(("Of the error of copying", f"{recon / copy:.1%}", "lower is better, 100 % is useless"))
    if recon > 0:
        items.append(
            ("With a wrong latent", f"{shuffled / recon:.1f}x", "the error; 1x: no better than another's")
        )
    health = lam.numbers.get("codebook")
    if health:
        used = f"{health['used']} of {health['size']}"
        items.append(("Codes in use", used, f"perplexity {health['perplexity']:.1f}"))
    warnings = "".join(f'<p class="warn">{text(warning)}</p>' for warning in lam.numbers.get("warnings", []))
    return Section(
        anchor="lam",
        title="The latent action model",
        what="A latent action is what changed between two timesteps of a video. These numbers are from "
        "held-out episodes, on which the model was not trained.",
        body=tiles(items) + warnings,
    )


def probe_section(lam: LamRun) -> Section | str:
    """Return the section with probes of actions from latents, their floors and controls."""
    probes = lam.numbers.get("probes") or {}
    if not probes:
        return "Probes need actions or enough held-out episodes, and there were none."
    items = []
    for name, (title, why) in PROBES.items():
        if name in probes:
            score = float(probes[name]["score"])
            low, high = (float(edge) for edge in probes[name].get("ci95") or (score, score))
            items.append((title, why, score, (low, high), name in CONTROLS))
    accuracy = next(iter(probes.values()))["metric"] == "accuracy"
    scale = "accuracy" if accuracy else "R2 (1: exact, 0: no better than the mean)"
    return Section(
        anchor="probes",
        title="Do latents hold the action?",
        what="A probe predicts the robot's action from a latent. It is fitted on half of the held-out "
        f"episodes and scored on the others by {scale}. Gray bars are controls: only a score above them "
        "is information from the change between frames.",
        body=figure(bars(items), "Brackets are 95 % intervals over the scored episodes."),
    )


def prediction_section(lam: LamRun) -> Section | str:
    """Return the section with predicted and real frames."""
    if "predicted" not in lam.arrays:
        return "There are no images of predictions."
    names = ("now", "next", "predicted")
    labels = ("the current frame", "the real next frame", "the predicted next frame")
    cells = []
    for i in range(len(lam.arrays["now"])):
        triple = "".join(
            f"<div>{image(lam.arrays[name][i], f'Example {i + 1}: {alt}')}<span>{name}</span></div>"
            for name, alt in zip(names, labels, strict=True)
        )
        cells.append(f'<div class="triple">{triple}</div>')
    return Section(
        anchor="predictions",
        title="Prediction and reality",
        what="From past frames and the latent action, the model predicts the next frame.",
        body=figure(
            f'<div class="examples">{"".join(cells)}</div>',
            "Timesteps with visible motion. A good prediction moves what "
            "moved; blur, or a copy of the current frame, is a bad sign.",
        ),
    )


def transfer_section(lam: LamRun) -> Section | str:
    """Return the section that applies latents in other episodes."""
    if "transfer_grid" not in lam.arrays:
        return "There is no transfer grid."
    return Section(
        anchor="transfer",
        title="One latent, many places",
        what="Each row takes the latent action of one change (left) and applies it to frames of other "
        "episodes (top).",
        body=figure(
            scroll(_transfer_table(lam.arrays), "Transfer grid"),
            "Read along a row: where the latent is an action, the same thing happens everywhere. Where a "
            "row shows the scene it was taken from, the latent encodes the image instead.",
        ),
    )


def _transfer_table(arrays: dict[str, np.ndarray]) -> str:
    starts = _numbered(arrays.get("transfer_start_episode"), len(arrays["transfer_start"]))
    sources = _numbered(arrays.get("transfer_source_episode"), len(arrays["transfer_source"]))
    head = "".join(
        f'<th scope="col"{FIRST if not j else ""}>{text(name)}{image(frame, f"Start, {name}")}</th>'
        for j, (name, frame) in enumerate(zip(starts, arrays["transfer_start"], strict=True))
    )
    lines = []
    for i, name in enumerate(sources):
        before, after = (
            image(frame, f"Latent of {name}, {when}")
            for frame, when in zip(arrays["transfer_source"][i], ("now", "next"), strict=True)
        )
        cells = "".join(
            f"<td{FIRST if not j else ''}>{image(frame, f'Latent of {name} applied in {starts[j]}')}</td>"
            for j, frame in enumerate(arrays["transfer_grid"][i])
        )
        lines.append(
            f'<tr><th scope="row"><span class="pair">{before}<span aria-hidden="true">→</span>'
            f"{after}</span>{text(name)}</th>{cells}</tr>"
        )
    return (
        f'<table class="grid"><thead><tr><th scope="col">latent of this change</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _numbered(episodes: np.ndarray | None, count: int) -> list[str]:
    return (
        [f"episode {e}" for e in episodes] if episodes is not None else [f"no. {i + 1}" for i in range(count)]
    )


def map_section(lam: LamRun) -> Section | str:
    """Return the section with a two-dimensional map of latents."""
    if not len(lam.arrays.get("vectors", ())):
        return "There are no latents for a map."
    names = [str(name) for name in lam.numbers.get("action_names", [])]
    content = latent_map(lam.arrays, names)
    by = "action" if "action" in lam.arrays else "time"
    caption = (
        f"The first two principal components of latents, which hold {content['share']:.0%} of the variance, "
        f"colored by {by}. If colors form clusters, latents encode actions. Hover over a dot for episode and "
        "time."
    )
    return Section(
        anchor="map",
        title="Map of latent actions",
        what="Every point is one transition; nearby points changed the video in similar ways.",
        body=figure(chart(content, label=f"Scatter plot of latents, colored by {by}", height=460), caption),
    )


def codebook_section(lam: LamRun) -> Section | str:
    """Return the section on code usage."""
    health = lam.numbers.get("codebook")
    if not health or "codes" not in lam.arrays:
        return "The model has no codebook, so there is no code usage."
    summary = (
        f"{health['used']} of {health['size']} codes are used, {health['dead']} never. The perplexity, "
        f"the effective number of codes, is {health['perplexity']:.1f}."
    )
    usage = codebook_usage(lam.arrays["codes"], health["size"])
    return Section(
        anchor="codebook",
        title="Codebook",
        what=summary,
        body=figure(
            chart(usage, label=f"Bar chart of code usage. {summary}", height=260),
            "Share of each code. A single tall bar would mean that the codes have collapsed.",
        ),
    )


def other_lams_section(lams: Sequence[LamRun]) -> Section:
    """Return the section with all latent action models, if there are several."""
    rows = []
    for lam in lams:
        probe = (lam.numbers.get("probes") or {}).get("latent_linear")
        recon, copy, shuffled = (lam.numbers[f"{name}_mse"] for name in ("recon", "copy", "shuffled"))
        cells = (
            f"{recon:.2g}",
            f"{recon / copy:.1%}" if copy else "-",
            f"{shuffled / recon:.1f}x" if recon else "-",
            f"{probe['score']:.2f}" if probe else "-",
        )
        rows.append((text(lam.path), cells, False))
    return Section(
        anchor="lams",
        title="All latent action models of this run",
        what="The images and charts above show the first.",
        body=table(
            ("Run", "Error", "Of copying", "Wrong latent", "Linear probe"), rows, "Latent action models"
        ),
    )
