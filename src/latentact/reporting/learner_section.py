"""The section of a report on a learner: its policies beside their baselines, and the curve over labels."""

from __future__ import annotations

from typing import Any

from latentact.learners.contract import Score, score
from latentact.reporting.charts import PALETTE
from latentact.reporting.html import Section, chart, table, text
from latentact.reporting.run_data import LearnerRun

NAMES = {
    "dagger": "DAgger",
    "bc": "Behavior cloning",
    "gail": "GAIL",
    "control": "GAIL on worthless demonstrations",
    "expert": "The expert",
}
WHAT = {
    "dagger": "Both are trained from scratch on the same number of the expert's labels, with the same steps "
    "and a learning rate that falls to zero, and evaluated on the same seeds. Behavior cloning learns from "
    "the expert's own episodes; DAgger from states that the learner visits.",
    "gail": "The control is the same training on worthless demonstrations: its score comes from the form of "
    "the reward, which favors long or short episodes, and not from imitation.",
}


def learner_section(run: LearnerRun, number: int) -> Section:
    """Return the scores of every policy of a learner, over all seeds."""
    groups = grouped(run.rows)
    cells = []
    for (method, labels), (found, rows) in groups.items():
        played = sum(row.get("played") or 0 for row in rows) / len(rows)
        values = (
            "-" if labels is None else str(labels),
            f"{found.mean:.3g} <small>({found.low:.3g} to {found.high:.3g})</small>",
            f"{played:.0f}" if played else "-",
            str(len(rows)),
            str(sum(row["episodes"] for row in rows)),
        )
        cells.append((text(NAMES.get(method, method)), values, method == run.learner))
    measure = next(iter(groups.values()))[0].name.capitalize()
    head = ("Policy", "Labels", f"{measure} (95 %)", "Episodes learned from", "Seeds", "Evaluated on")
    body = f"<p>{text(run.verdict)}</p>{table(head, cells, 'Policies of a learner')}"
    if any(labels is not None for _, labels in groups):
        content = _curves({key: found for key, (found, _) in groups.items()}, measure)
        body += chart(content, label=f"{measure} over labels of the expert")
    return Section(
        anchor=f"learner{number or ''}",
        title=f"{NAMES.get(run.learner, run.learner)} on {run.env}",
        what=WHAT.get(run.learner, "The policies of the learner and of its baselines, on the same seeds."),
        body=body,
    )


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, int | None], tuple[Score, list[dict[str, Any]]]]:
    """Return the score and the rows of every method and number of labels, over all seeds."""
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row.get("labels")), []).append(row)
    return {key: (score(some), some) for key, some in groups.items()}


def _curves(scores: dict[tuple[str, int | None], Score], measure: str) -> dict[str, Any]:
    methods = [*dict.fromkeys(method for method, labels in scores if labels is not None)]
    data = []
    for color, method in zip(PALETTE, methods, strict=False):
        points = [(labels, found) for (name, labels), found in scores.items() if name == method]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": NAMES.get(method, method),
                "x": [labels for labels, _ in points],
                "y": [found.mean for _, found in points],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [found.high - found.mean for _, found in points],
                    "arrayminus": [found.mean - found.low for _, found in points],
                },
                "line": {"color": color, "width": 2},
            }
        )
    xs: list[Any] = [x for trace in data for x in trace["x"]]
    if expert := scores.get(("expert", None)):
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": NAMES["expert"],
                "x": [min(xs), max(xs)],
                "y": [expert.mean] * 2,
                "line": {"color": PALETTE[-1], "width": 2, "dash": "dot"},
            }
        )
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "labels of the expert"}},
            "yaxis": {"title": {"text": measure.lower()}},
            "showlegend": True,
        },
    }
