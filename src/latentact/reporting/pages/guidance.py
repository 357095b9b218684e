"""The page of `check-guidance --operations`: how well the policy follows its guide and edited guides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentact.io.atomic import atomic_write
from latentact.reporting.html import Section, fold, page, table, text

MEASURES = {
    "agent": "distance of the agent",
    "block": "distance of the block",
    "coverage": "coverage at the end",
    "max_coverage": "maximum coverage",
}
"""Measure of a rollout -> meaning; others have their names."""
WORDS = {
    "to_first": "distance of the blend to the first parent",
    "to_second": "distance of the blend to the second parent",
    "parents": "distance between the parents",
    "largest": "largest distance to a parent",
    "distance": "distance to the second demonstration's path",
    "stayed": "the same if the agent had stayed",
    "shape": "distance of the two paths moved to one start",
    "before": "largest distance before the segment",
    "inside": "change of motion per step in the segment",
    "after": "change of motion per step after it",
    "path": "distance of the paths after it",
    "moved": "distance from the start, unedited",
    "still": "distance from the start, scaled by 0",
    "margin": "margin; passes if its interval lies at or above 0",
}
"""Number -> meaning."""


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Write the page, which works offline.

    Args:
        path: output file.
        result: content of `guidance.json` with `operations`.

    Raises:
        UserError: plotly is missing.
    """
    edits = result["operations"]
    passed = sum(found["passes"] for found in edits.values())
    whole = page(
        command="check-guidance",
        name=path.parent.name,
        headline=result["verdict"],
        lead=f'<p class="lead">Rollouts follow {passed} of {len(edits)} operations on guides.</p>',
        numbers=[
            (name.capitalize(), "pass" if found["passes"] else "fail", f"{found['pairs']} pairs of guides")
            for name, found in edits.items()
        ],
        sections=[_conditions(result), _operations(edits), _settings(result)],
    )
    with atomic_write(path) as partial:
        partial.write_text(whole, encoding="utf-8")


def _conditions(result: dict[str, Any]) -> Section:
    conditions = result["conditions"]
    rows = [
        (text(MEASURES.get(name, name)), [_cell(found[name]) for found in conditions.values()], False)
        for name in next(iter(conditions.values()))
    ]
    return Section(
        anchor="following",
        title="Does it follow its guide?",
        what="Rollouts with the matching demonstration as guide, a wrong one and none: means with 95 % "
        "intervals. Distances are to the demonstration, in the environment's units.",
        body=table(("Measure", *conditions), rows, "Guides compared"),
    )


def _operations(edits: dict[str, Any]) -> Section:
    parts = []
    for name, found in edits.items():
        style = "lead" if found["passes"] else "warn"
        rows = [(text(WORDS[key]), [_cell(value)], False) for key, value in found["numbers"].items()]
        parts.append(f'<p class="{style}"><strong>{text(name)}</strong>: {text(found["verdict"])}</p>')
        parts.append(table(("Number", "Mean and 95 % interval"), rows, name))
    return Section(
        anchor="operations",
        title="Do rollouts follow edited guides?",
        what="All rollouts of a pair of guides have the start state of the first. Distances are between "
        "paths of the agent, in the environment's units.",
        body="".join(parts),
    )


def _settings(result: dict[str, Any]) -> Section:
    content = text(json.dumps(result["config"], indent=2))
    return Section(
        anchor="settings",
        title="Settings",
        what="The command's settings.",
        body=fold("Show", f"<pre><code>{content}</code></pre>"),
    )


def _cell(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.3g} ({low:.3g} to {high:.3g})"
