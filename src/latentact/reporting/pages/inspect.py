"""The report card of a latent action model as one page that works offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.io.atomic import atomic_write
from latentact.reporting import inspect_charts as charts
from latentact.reporting.html import (
    Section,
    bars,
    chart,
    figure,
    fold,
    image,
    page,
    table,
    text,
    tiles,
)
from latentact.reporting.lam_sections import PROBES, codebook_section, prediction_section, transfer_section
from latentact.reporting.run_data import LamRun

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

BARS = PROBES | {
    "latent_and_present_linear": ("Latent and present together", "Read by a linear model."),
    "latent_and_present_mlp": (
        "Latent and present together, small network",
        "Read by an MLP with two hidden layers.",
    ),
    "state": ("Latent action to state", "Position of the robot, which a latent of change need not contain."),
    "state_change": (
        "Latent action to change of state",
        "Displacement of the robot, read by a linear model.",
    ),
    "state_change_state_only": ("Floor: present to change of state", "The same without a latent."),
    "state_change_shuffled_future": ("Control: shuffled future", "Latents with a wrong next frame."),
    "nuisance_linear": ("Latent action to nuisance", "Motion of the background or camera. Lower is better."),
    "nuisance_mlp": ("Latent action to nuisance, small network", "The same, read by an MLP."),
    "nuisance_from_action": (
        "Control: action to nuisance",
        "Read from the true action; latents need no more than that.",
    ),
}
"""Probe -> display name and explanation."""
GROUPS = {
    "Action": (
        *("latent_linear", "latent_mlp", "latent_and_present_linear", "latent_and_present_mlp"),
        *("state_only", "shuffled_future"),
    ),
    "State": ("state_change", "state_change_state_only", "state_change_shuffled_future", "state"),
    "Nuisance": ("nuisance_linear", "nuisance_mlp", "nuisance_from_action"),
}
CONTROLS = (
    *("state_only", "shuffled_future", "state_change_state_only", "state_change_shuffled_future"),
    "nuisance_from_action",
)
ABSENT = "-"
LEAST_DB = 0.01  # smaller values are not worth a chart


def write_page(path: Path, numbers: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write the page.

    Args:
        path: output file.
        numbers: content of `inspect.json`.
        arrays: latents, their map and images, from `inspect_lam`.

    Raises:
        UserError: plotly is missing.
    """
    lam = LamRun(path=".", numbers=numbers | (numbers["reconstruction"] or {}), arrays=arrays)
    has_structure = numbers["verdict"]["name"] not in ("collapsed", "too_few")
    made = (
        _findings(numbers),
        _probes(numbers),
        _labels(numbers) if has_structure else None,
        _alignment(numbers) if has_structure else None,
        _use(numbers),
        prediction_section(lam),
        transfer_section(lam) if has_structure and numbers["episodes"] > 1 else None,
        _content(numbers) if has_structure else None,
        _map(numbers, arrays) if has_structure else None,
        _saliency(numbers, arrays) if has_structure else None,
        codebook_section(lam),
        _missing(numbers),
    )
    sections = [section for section in made if isinstance(section, Section)]
    verdict, name = numbers["verdict"], Path(numbers["lam"]).name
    whole = page(
        command="inspect",
        name=f"{name} ({numbers['model']}) on {Path(numbers['data']).name}",
        headline=verdict["headline"],
        lead=f'<p class="lead"><b>Next.</b> {text(verdict["recommendation"])}</p>',
        numbers=_headline_numbers(numbers),
        sections=sections,
    )
    with atomic_write(path) as partial:
        partial.write_text(whole, encoding="utf-8")


def _headline_numbers(numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    probes, recon, items = numbers["probes"], numbers["reconstruction"], []
    if "latent_linear" in probes:
        best = max(probes["latent_linear"]["score"], probes["latent_mlp"]["score"])
        floor = max(probes["state_only"]["score"], probes["shuffled_future"]["score"])
        what = "accuracy" if probes["latent_linear"]["metric"] == "accuracy" else "R2"
        items.append((f"Action from latent, {what}", _short(best), f"{_short(floor)} without it"))
    if "nuisance_linear" in probes:
        worst = max(probes["nuisance_linear"]["score"], probes["nuisance_mlp"]["score"])
        items.append(("Nuisance from latent, R2", _short(worst), "lower is better"))
    if recon and recon["recon_mse"] > 0:
        times = recon["shuffled_mse"] / recon["recon_mse"]
        items.append(("Error with a wrong latent", f"{times:.1f}x", "1x: no better than another's"))
    if _lags(numbers):
        shift = numbers["misaligned"]
        items.append(
            ("Actions are shifted by", f"{shift:+d}", "rows; 0 is right")
            if shift
            else ("Actions are shifted by", "0", "rows; no other lag is clearly better")
        )
    dims = numbers["latents"]
    if numbers["verdict"]["name"] != "collapsed":
        items.append(("Dimensions in use", f"{dims['effective_dims']:.1f}", f"of {dims['dims']}"))
    return items


def _short(score: float) -> str:
    return f"{score:.2f}" if score >= 0 else "below 0"


def _lags(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lag curve if latents predict the action at any lag."""
    curve = numbers["lags"]
    return curve if any(row["score"] > 0 for row in curve) else []


def _findings(numbers: dict[str, Any]) -> Section | None:
    found = numbers["verdict"]["findings"]
    if not found:
        return None
    cards = "".join(
        f'<p class="warn"><b>{text(f["level"].capitalize())}, {text(f["name"].replace("_", " "))}:</b> '
        f"{text(f['message'])} <b>Next:</b> {text(f['recommendation'])}</p>"
        for f in found
    )
    return Section(
        anchor="findings",
        title="What was found",
        what="The worst first. A no-go rules out training policies on these latents; a caution does not.",
        body=cards,
    )


def _probes(numbers: dict[str, Any]) -> Section | None:
    probes, parts = numbers["probes"], []
    for title, names in GROUPS.items():
        items = [
            (*BARS[name], probes[name]["score"], tuple(probes[name]["ci95"]), name in CONTROLS)
            for name in names
            if name in probes
        ]
        if items:
            parts.append(f"<h3>{title} <small>{_scale(probes[names[0]])}</small></h3>{bars(items)}")
    if not parts:
        return None
    many = numbers["episodes"] > 1
    rows: list[tuple[str, tuple[str, ...], bool]] = [
        (
            text(BARS[name][0]),
            (
                f"{probe['score']:.3f} <small>({probe['ci95'][0]:.3f} to {probe['ci95'][1]:.3f})</small>",
                f"{probe['nmse']:.3f}" if "nmse" in probe else ABSENT,
            ),
            False,
        )
        for name, probe in probes.items()
    ]
    return Section(
        anchor="probes",
        title="What latents encode",
        what=("A probe is fitted on half of the episodes and scored on the others. " if many else "")
        + "Gray bars are floors and controls: only a score above them is information from the change between "
        f"frames. Brackets are 95 % intervals over {'episodes' if many else 'transitions'}.",
        body="".join(parts) + fold("All probes as numbers", _table(rows)),
    )


def _table(rows: list[tuple[str, tuple[str, ...], bool]]) -> str:
    return table(("Probe", "R2 or accuracy", "NMSE"), rows, "All probes")


def _scale(probe: dict[str, Any]) -> str:
    return "accuracy" if probe["metric"] == "accuracy" else "R2: 1 is exact, 0 is guessing the mean"


def _labels(numbers: dict[str, Any]) -> Section | None:
    curve = numbers["label_efficiency"]
    if len(curve) < 2:
        return None
    return Section(
        anchor="labels",
        title="How many labeled episodes it takes",
        what="A linear model from latents to actions, fitted on k episodes. The gap between the curves is "
        "the value of latents with few labels.",
        body=figure(
            chart(charts.labels(curve), label="Line chart of probe score over labeled episodes"),
            "Mean over draws of the k episodes; the band spans the worst and the best draw. The floor uses "
            "the current timestep alone with the same labels. For continuous actions, the part that the "
            "robot's state predicts is removed first.",
        ),
    )


def _alignment(numbers: dict[str, Any]) -> Section | None:
    panels, descriptions = [], []
    for title, curve, draw, what in (
        (
            *("Action at other rows", _lags(numbers), charts.lags),
            "At other rows: how well latents predict the action recorded some rows earlier or later; the "
            "peak should be at 0. A clearly higher peak elsewhere means that the data is off by that many "
            "rows.",
        ),
        (
            *("Other frame gaps", numbers["gaps"], charts.gaps),
            "Other gaps: the same model over shorter and longer gaps, and how much of the image moves.",
        ),
    ):
        if curve:
            drawn = chart(draw(curve), label=f"Line chart: {title}", height=260)
            panels.append(f"<figure><figcaption>{title}</figcaption>{drawn}</figure>")
            descriptions.append(what)
    if not panels:
        return None
    return Section(
        anchor="time",
        title="Are actions and frames aligned?",
        what=" ".join(descriptions),
        body=f'<div class="panels">{"".join(panels)}</div>',
    )


def _use(numbers: dict[str, Any]) -> Section | None:
    recon, control = numbers["reconstruction"], numbers["controllability"]
    if recon is None:
        return None
    items = [("Error of the predicted frame", f"{recon['recon_mse']:.2g}", "mean squared, pixels 0 to 1")]
    if recon["copy_mse"] > 0:
        share = recon["recon_mse"] / recon["copy_mse"]
        items.append(("Of the error of copying", f"{share:.1%}", "lower is better"))
    if recon["recon_mse"] > 0:
        items.append(
            ("With a wrong latent", f"{recon['shuffled_mse'] / recon['recon_mse']:.1f}x", "the error")
        )
    body = tiles(items)
    if control:
        change = f"{numbers['prediction_change']:.0%}"
        body = tiles([*items, ("Change by another latent", change, "of the change in the video")])
    if control and max(map(abs, control["delta_psnr"]), default=0) >= LEAST_DB:
        body += figure(
            chart(charts.control(control["delta_psnr"]), label="Bar chart of delta PSNR", height=240),
            "Delta PSNR in dB: by how much frames rolled out with the video's latents are nearer to it than "
            "with another video's. 0 means that latents have no effect.",
        )
    return Section(
        anchor="use",
        title="Are latents used?",
        what="The forward model predicts the next frame from the current frame and a latent: its own, "
        "another timestep's, and over several steps.",
        body=body,
    )


def _content(numbers: dict[str, Any]) -> Section:
    latents, leak, algebra = numbers["latents"], numbers["leakage"] or {}, numbers["algebra"] or {}
    metrics = (
        ("Spread", latents["spread"], "standard deviation over magnitude; 0 is collapse"),
        ("Dependence on the future", latents["future_dependence"], "0: the next frame is not used"),
        ("S-PCFC", leak.get("s_pcfc"), "near 1: latents encode the target frame; low is better"),
        ("S-PCFC, centered", leak.get("centered"), "the same without what all latents share"),
        ("Error across cuts", leak.get("across_cuts"), "of that of copying; low: they may encode the image"),
        ("Additivity", algebra.get("additivity"), "|z(a,c) - z(a,b) - z(b,c)| / |z|; 0 is exact"),
        ("Reversal", algebra.get("reversal"), "|z(a,b) + z(b,a)| / |z|; 0 is exact"),
        ("Identity", algebra.get("identity"), "|z(a,a)| / |z|; 0 is exact"),
    )
    rows = [(text(n), (ABSENT if v is None else f"{v:.2f}", text(why)), False) for n, v, why in metrics]
    return Section(
        anchor="content",
        title="Motion or appearance?",
        what="What latents encode, measured without labels: their response to wrong futures, reversed time "
        "and cuts, and whether they add up like motions.",
        body=table(("Measure", "Value", "How to read it"), rows, "Label-free measures"),
    )


def _map(numbers: dict[str, Any], arrays: dict[str, np.ndarray]) -> Section:
    parts = []
    for title, content in charts.maps(arrays, [str(name) for name in numbers["action_names"]]).items():
        parts.append(
            f"<figure><figcaption>{text(title)}</figcaption>"
            f"{chart(content, label=f'Scatter plot of latents, {title}', height=430)}</figure>"
        )
    return Section(
        anchor="map",
        title="Map of latent actions",
        what="Every point is one transition. Colors by action should form clusters or a gradient; clusters "
        "by episode mean that latents encode the scene, a gradient over time that they drift.",
        body="".join(parts),
    )


def _saliency(numbers: dict[str, Any], arrays: dict[str, np.ndarray]) -> Section | None:
    found = numbers["saliency"]
    if not found:
        return None
    cells = "".join(
        image(_heat(now, response), f"Example {i + 1}: where latents respond")
        for i, (now, response) in enumerate(zip(arrays["salient_now"], arrays["salient"], strict=True))
    )
    return Section(
        anchor="saliency",
        title="Where latents respond",
        what=f"{found['share_inside']:.0%} of the response of latents is in moving regions, which are "
        f"{found['area']:.0%} of the image.",
        body=figure(
            f'<div class="videos">{cells}</div>',
            "Regions of both frames are grayed out in turn; the brighter a region, the more the latent "
            "changes.",
        ),
    )


def _heat(now: UInt8[np.ndarray, "h w 3"], response: Float[np.ndarray, "g g"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image, darkened except where latents respond."""
    height, width = now.shape[:2]
    rows, columns = (np.arange(side) * len(response) // side for side in (height, width))
    weight = (response / max(response.max(), 1e-12))[rows][:, columns, None]
    return (now * (0.25 + 0.75 * weight)).astype(np.uint8)


def _missing(numbers: dict[str, Any]) -> Section | None:
    if not numbers["missing"]:
        return None
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in numbers["missing"])
    what = (
        f"{numbers['transitions']} transitions of {numbers['episodes']} episode(s), "
        f"{numbers['frame_gap_s']:g} s apart. Not in this report:"
    )
    return Section(anchor="absent", title="Data and missing metrics", what=what, body=f"<ul>{items}</ul>")
