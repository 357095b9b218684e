"""The page of one imitation: frames of demonstration and rollout, and their agreement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from latentact.io.atomic import atomic_write
from latentact.reporting.html import (
    Section,
    chart,
    figure,
    fold,
    image,
    page,
    table,
    text,
    video,
)

FOLLOWS = 0.1
"""Margin over the chance agreement above which a rollout counts as following its guide."""


def write_page(
    path: Path,
    metrics: dict[str, Any],
    stills: UInt8[np.ndarray, "n h w 3"] | None,
    film: Path | None,
) -> None:
    """Write the page, which works offline.

    Args:
        path: output file.
        metrics: content of `metrics.json`.
        stills: images of the run.
        film: video of the run.

    Raises:
        UserError: plotly is missing.
    """
    made = (
        _watch(stills, film),
        _agreement(metrics),
        _live(metrics),
        _safety(metrics),
        _settings(metrics),
    )
    sections = [section for section in made if section is not None]
    whole = page(
        command="imitate",
        name=path.parent.name,
        headline=headline(metrics),
        lead=f'<p class="lead">{text(_lead(metrics))}</p>',
        numbers=_numbers(metrics),
        sections=sections,
    )
    with atomic_write(path) as partial:
        partial.write_text(whole, encoding="utf-8")


def headline(metrics: dict[str, Any]) -> str:
    """Return in one sentence whether the policy follows its guide."""
    found = metrics["agreement"]
    if not found or not found["measure"]:
        return "Whether the policy follows its guide was not measured."
    mean, others = found["mean"], found["chance"]
    beside = (
        f"{found['measure']} {mean:.2f} at the same timestep, {others:.2f} with the guide's other timesteps"
    )
    if mean - others > FOLLOWS:
        return f"The rollout follows the guide: {beside}."
    return f"The rollout does not follow the guide: {beside}."


def _lead(metrics: dict[str, Any]) -> str:
    success = metrics.get("success")
    done = "" if success is None else f" The task {'succeeded' if success else 'did not succeed'}."
    return f"It ended after {metrics['steps']} steps: {metrics['ended'].rstrip('.')}.{done}"


def _numbers(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    guide, items = metrics["guide"], []
    if metrics.get("success") is not None:
        items.append(("Success", "yes" if metrics["success"] else "no", "the environment's own"))
    if "return" in metrics:
        best = f"largest reward {metrics['largest_reward']:.2f}"
        items.append(("Return", f"{metrics['return']:.2f}", best))
    found = metrics["agreement"]
    if found and found["measure"]:
        items.append(("Agreement", f"{found['mean']:.2f}", f"{found['chance']:.2f} by chance"))
    if "missed_deadlines" in metrics:
        late = f"latest by {1000 * metrics['latest_s']:.0f} ms"
        items.append(("Missed deadlines", str(metrics["missed_deadlines"]), late))
        held = sum(metrics["holds"].values())
        items.append(("Steps held still", str(held), f"of {metrics['steps']}"))
    if live := metrics.get("live"):
        found = live["latency_ms"]["capture_to_action"]
        value = f"{found['p95']:.0f} ms" if found else "unknown"
        items.append(("Capture to action", value, f"95th percentile; {live['dropped']} frames dropped"))
    rate = f"{guide['latent_actions']} latent actions at {guide['fps']:g} per second"
    items.append(("Guide", f"{guide['seconds'] or 0:.1f} s", rate))
    return items


def _watch(stills: np.ndarray | None, film: Path | None) -> Section | None:
    if stills is None:
        return None
    shown = "".join(image(np.ascontiguousarray(s), f"still {i + 1}") for i, s in enumerate(stills))
    body = f'<div class="examples">{shown}</div>'
    if film is not None:
        caption = "Demonstration and rollout at the same timestep of the guide."
        body = f'<div class="pixels">{figure(video(film, caption), caption)}</div>' + fold("Stills", body)
    return Section(
        anchor="watch",
        title="Demonstration and rollout",
        what="Left: the demonstration, if its video was given; right: the rollout.",
        body=body,
    )


def _agreement(metrics: dict[str, Any]) -> Section | None:
    found = metrics["agreement"]
    if not found:
        return None
    if not found["measure"]:
        body = f'<p class="warn">{text(found["why"])}</p>'
    else:
        body = figure(
            _chart(found, metrics["fps"]), "The dotted line is the mean over the guide's timesteps."
        )
    return Section(
        anchor="agreement",
        title="Agreement with the guide",
        what="The LAM encodes the rollout, and its latent actions are compared with the guide's, step by "
        "step. 1 is the same change. The dotted line is the score of a rollout that ignores the order.",
        body=body,
    )


def _chart(found: dict[str, Any], fps: float) -> str:
    steps = found["steps"]
    times = [round(i / fps, 3) for i in range(len(steps))]
    lines = (("same timestep", steps, "#0d8a72", "solid"),)
    lines += (("other timesteps", [found["chance"]] * len(steps), "#6b7280", "dot"),)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": times,
            "y": values,
            "line": {"color": color, "width": 2, "dash": dash},
        }
        for name, values, color, dash in lines
    ]
    layout = {"xaxis": {"title": {"text": "seconds"}}, "yaxis": {"title": {"text": found["measure"]}}}
    return chart({"data": data, "layout": layout}, label="Line chart of the agreement over time")


def _live(metrics: dict[str, Any]) -> Section | None:
    if not (live := metrics.get("live")):
        return None
    rows = [
        (stage.replace("_", " "), tuple(f"{found[key]:.1f}" for key in ("p50", "p95", "max")), False)
        for stage, found in live["latency_ms"].items()
        if found
    ]
    counts = [
        ("frames captured", (str(live["captured"]),), False),
        ("frames dropped, because the LAM was too slow", (str(live["dropped"]),), False),
        (f"steps with a frame older than {live['max_age_s']:g} s", (str(live["stale_steps"]),), False),
        ("steps of the demonstration skipped to catch up", (str(live["skipped_steps"]),), False),
    ]
    if live["late_steps"] is not None:
        counts.append(("late control steps", (str(live["late_steps"]),), False))
    ahead = f" The policy reads latent actions up to {live['delay_s']:g} s ahead and follows as much later."
    return Section(
        anchor="live",
        title="Latency",
        what=f"From the camera {live['camera']} at {live['fps']:g} frames per second to the action."
        + (ahead if live["delay_s"] else ""),
        body=table(("Milliseconds", "Median", "95 %", "Maximum"), rows, "Latency")
        + table(("What", "Number"), counts, "Frames and steps"),
    )


def _safety(metrics: dict[str, Any]) -> Section | None:
    if "missed_deadlines" not in metrics:
        return None
    rows = [
        *((f"held still: {text(why)}", (str(n),), False) for why, n in metrics["holds"].items()),
        *((f"refused: {text(why)}", (str(n),), False) for why, n in metrics["refused"].items()),
        *((f"clipped: {text(what)}", (str(n),), False) for what, n in metrics["clipped"].items()),
        ("missed deadlines", (str(metrics["missed_deadlines"]),), False),
    ]
    events = "".join(f"<li>{text(_event(event))}</li>" for event in metrics["events"])
    end = "The robot was disconnected." if metrics["disconnected"] else "The robot was NOT disconnected."
    free = metrics["without_limits"]
    unlimited = f'<p class="warn">No limits were given for {text(", ".join(free))}.</p>' if free else ""
    return Section(
        anchor="safety",
        title="Safety and timing",
        what=f"The safety layer between the policy and the robot. {end}",
        body=unlimited
        + table(("What", "Steps"), rows, "Safety and timing")
        + (fold("All events", f"<ul>{events}</ul>") if events else ""),
    )


def _event(event: dict[str, Any]) -> str:
    first, last = event["from_step"], event["to_step"]
    return f"step {first}{f' to {last}' if last > first else ''}: {event['message']}"


def _settings(metrics: dict[str, Any]) -> Section:
    content = json.dumps({key: metrics[key] for key in ("config", "guide")}, indent=2)
    return Section(
        anchor="settings",
        title="Settings",
        what="The command's settings and the guide.",
        body=fold("Show", f"<pre><code>{text(content)}</code></pre>"),
    )
