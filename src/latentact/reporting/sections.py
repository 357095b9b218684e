"""Sections of a report on policies and runs: each returns its part of the page, or why it is missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from latentact.evaluation.policy.comparison import LIMITED, Result, aggregate
from latentact.evaluation.policy.rollout import conditions
from latentact.reporting.card import finetuning
from latentact.reporting.charts import curve_panels
from latentact.reporting.comparison_plot import color, comparison_svg
from latentact.reporting.html import Section, chart, figure, fold, table, text, video
from latentact.reporting.run_data import Comparison, Curves, Findings, RolloutRecord

VIDEOS_EACH = 4  # maximum videos per policy
VIDEO_BYTES = 32_000_000  # maximum videos per page
UNFOLDED = 6  # policies whose videos are shown without a click
UNKNOWN = 99  # sort key of a rollout that is not part of a comparison
ABSENT = "-"


def comparison_section(comparison: Comparison, number: int) -> Section:
    """Return the section that compares methods with the same labels."""
    results = aggregate(comparison.rows)
    body = _comparison_table(results) + figure(
        f'<div class="plot">{comparison_svg(results, title=comparison.env)}</div>',
        "Bars are 95 % intervals over the episodes of all seeds: if two do not overlap, the difference is "
        "unlikely to be due to chance. The dashed line is the oracle, which is trained on all labels.",
    )
    return Section(
        anchor=f"comparison{number or ''}",
        title=f"Every method on {comparison.env}",
        what="Same network, training steps, labeled episodes and evaluation seeds in every row; k is "
        "the number of labeled episodes. BC on k labels does not use the other videos. IDM on k labels "
        "learns actions from the k episodes and predicts those of all others. Latent policies are then "
        "fine-tuned for additional steps, as configured; 'decoder only' is the result before fine-tuning. "
        "VLA rows share their own network, a vision-language model.",
        body=body,
    )


def _comparison_table(results: Sequence[Result]) -> str:
    oracle = next((r.score for r in results if r.method == "oracle" and r.score > 0), None)
    best: dict[int | None, float] = {}
    for r in results:
        if r.method in LIMITED:
            best[r.k] = max(r.score, best.get(r.k, 0.0))
    rows = []
    for r in results:
        key = f'<span class="key" style="background:{color(r.method)}"></span>{text(r.label)}'
        success = ABSENT
        if r.success is not None:
            success = f"{r.success:.2f} <small>({r.interval[0]:.2f} to {r.interval[1]:.2f})</small>"
        share = ABSENT if oracle is None or r.method == "oracle" else f"{r.score / oracle:.0%}"
        labels = str(r.k) if r.k is not None else "-" if r.method == "uniform" else "all"
        updates = ABSENT if r.updates is None else str(r.updates)
        cells = (labels, updates, success, share, f"{r.mean_return:.2f}", str(r.seeds), str(r.episodes))
        rows.append((key, cells, r.method in LIMITED and r.score > 0 and r.score == best[r.k]))
    head = ("Method", "k", "Updates", "Success (95 %)", "Of oracle", "Return", "Seeds", "Episodes")
    return table(head, rows, "Comparison of methods")


def rollout_section(found: Findings) -> Section | str:
    """Return the section with rollouts and their videos: for every method and k, the first recorded seed.

    Rollouts without videos are left out if a comparison or a learner has their numbers.
    """
    titles = _rollout_titles(found)
    shown: dict[tuple[int, str], RolloutRecord] = {}
    for rollout in found.rollouts:
        if rollout.videos or not titles:
            shown.setdefault(titles.get(rollout.path, (UNKNOWN, _name(found, rollout.path))), rollout)
    for evaluation in found.evaluations:
        shown[UNKNOWN, f"{_name(found, evaluation.path)}, by lerobot-eval"] = evaluation
    if not shown:
        return "No rollout was recorded."
    budget = VIDEO_BYTES
    parts = []
    for i, ((_, title), rollout) in enumerate(sorted(shown.items(), key=lambda item: item[0])):
        cells = []
        for path in rollout.videos[:VIDEOS_EACH]:
            if (size := path.stat().st_size) <= budget:
                budget -= size
                caption = _episode(path.stem, rollout.numbers)
                if len({file.parent for file in rollout.videos}) > 1:
                    caption = f"{path.parent.name}, {caption}"
                cells.append(figure(video(path, f"{title}, {caption}"), caption))
        reached, grid = _reached(rollout, len(cells)), _group_table(rollout.numbers)
        grid += f'<div class="videos pixels">{"".join(cells)}</div>' if cells else ""
        if len(shown) > UNFOLDED:
            parts.append(fold(f"{title}: {reached}", grid, unfolded=i < UNFOLDED))
        else:
            parts.append(f"<h3>{text(title)} <small>{text(reached)}</small></h3>{grid}")
    return Section(
        anchor="rollouts",
        title="Watch the policies act",
        what="The first recorded episodes of every policy, not the best ones. Brackets are 95 % intervals.",
        body="".join(parts),
    )


def _rollout_titles(found: Findings) -> dict[str, tuple[int, str]]:
    """Return folder -> sort key and title, for the rollouts of comparisons."""
    titles = {}
    for comparison in found.comparisons:
        results = {(r.method, r.k): (i, r.label) for i, r in enumerate(aggregate(comparison.rows))}
        for row in comparison.rows:
            place, label = results[row.method, row.k]
            env = f"{comparison.env}: " if len(found.comparisons) > 1 else ""
            known = "" if row.k is None else f", k = {row.k}"
            folder = row.run if comparison.path == "." else f"{comparison.path}/{row.run}"
            titles[folder.rstrip("/")] = (place, f"{env}{label}{known}")
    for run in found.learners:
        for place, row in enumerate(run.rows):
            counted = "" if row.get("labels") is None else f", {row['labels']} labels"
            folder = row["run"] if run.path == "." else f"{run.path}/{row['run']}"
            titles[folder] = (place, f"{run.env}: {row['method']}{counted}, seed {row['seed']}")
    return titles


def _reached(rollout: RolloutRecord, shown: int) -> str:
    numbers = rollout.numbers
    scores = [
        f"{name} {_score(numbers, name, interval)}"
        for name, interval in (("success", "ci95"), ("return", "return_ci95"))
        if numbers.get(name) is not None
    ]
    parts = [f"{', '.join(scores)} over {numbers.get('episodes')} episodes"] if scores else []
    parts += filter(None, [conditions(numbers)])
    if shown < len(rollout.videos):
        parts.append(f"{shown} of {len(rollout.videos)} videos shown")
    return "; ".join(parts)


def _score(numbers: dict[str, Any], name: str, interval: str) -> str:
    bounds = numbers.get(interval)
    return f"{numbers[name]:.2f}" + (f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else "")


def _group_table(numbers: dict[str, Any]) -> str:
    """Return the results of an evaluation on several groups of tasks."""
    groups = numbers.get("groups") or {}
    if len(groups) < 2:
        return ""
    rows = [
        (text(name), (_score(n, "success", "ci95"), f"{n['return']:.2f}", str(n["episodes"])), False)
        for name, n in groups.items()
    ]
    return table(("Tasks", "Success (95 %)", "Return", "Episodes"), rows, "Results by group of tasks")


def _name(found: Findings, path: str) -> str:
    return found.name if path == "." else path


def _episode(stem: str, numbers: dict[str, Any]) -> str:
    found = re.search(r"\d+", stem)
    index = int(found.group()) if found else -1
    successes = numbers.get("successes") or []
    if not 0 <= index < len(successes):
        return stem.replace("_", " ")
    return f"episode {index}: {'succeeds' if successes[index] else 'fails'}"


def vla_section(found: Findings) -> Section:
    """Return the section on actions predicted by vision-language-action models, with baselines."""
    parts = []
    for run in found.vlas:
        numbers = run.numbers
        groups = {"model": numbers["score"], **numbers.get("baselines", {}), **numbers.get("controls", {})}
        rows = [(text(name.replace("_", " ")), (f"{n:.3f}",), name == "model") for name, n in groups.items()]
        metric = "R2" if numbers["metric"] == "r2" else "Accuracy"
        title = _name(found, run.path)
        scores = table(("Prediction", metric), rows, "Prediction of latent actions")
        parts.append(f"<h3>{text(title)}</h3><p>{text(numbers.get('verdict', ''))}</p>{scores}")
    parts += [
        f"<h3>{text(_name(found, run.path))}</h3><p>{text(finetuning(run.numbers))}</p>"
        for run in found.finetuned
    ]
    kinds, what = [], ["On held-out episodes."]
    if found.vlas:
        kinds.append("latent")
        what.append(
            "Majority, majority of task and previous need no model: a model that does not beat them has "
            "learned nothing useful. With shuffled images or a blank prompt, a model that uses the image and "
            "the text gets worse."
        )
    if found.finetuned:
        kinds.append("robot")
        what.append("Fine-tuned models predict robot actions; the majority or mean action needs no model.")
    return Section(
        anchor="vla",
        title=f"{' and '.join(kinds).capitalize()} actions from image and text",
        what=" ".join(what),
        body="".join(parts),
    )


def curve_section(found: Findings) -> Section | str:
    """Return the section with the learning curves of every run folder."""
    runs = [curves for curves in found.curves if curves.series]
    if not runs:
        return "There are no learning curves."
    runs.sort(key=lambda curves: (curves.path not in {lam.path for lam in found.lams}, curves.path))
    return Section(
        anchor="curves",
        title="Learning curves",
        what="One panel per training run. Dotted lines are from held-out episodes; scales are logarithmic "
        "where values span more than a factor of twenty.",
        body="".join(fold(_name(found, c.path), _panels(c), unfolded=not i) for i, c in enumerate(runs)),
    )


def _panels(curves: Curves) -> str:
    panels = [
        f"<figure><figcaption>{text(name)}</figcaption>"
        f"{chart(content, label=f'Line chart of {name} over training steps', height=230)}</figure>"
        for name, content in curve_panels(curves).items()
    ]
    return f'<div class="panels">{"".join(panels)}</div>'


def config_section(found: Findings) -> Section | str:
    """Return the section with the settings of every run."""
    if not found.configs:
        return "There are no configurations."
    return Section(
        anchor="configs",
        title="Configurations",
        what="The complete settings of every run.",
        body="".join(
            fold(_name(found, path), f"<pre><code>{text(content)}</code></pre>")
            for path, content in found.configs.items()
        ),
    )
