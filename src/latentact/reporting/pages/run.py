"""The report: `report.json` for programs and one `report.html` for people, which works offline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latentact.evaluation.policy.comparison import BASELINES, LATENT, aggregate
from latentact.io.atomic import atomic_write, write_json
from latentact.reporting.card import finetuning
from latentact.reporting.html import Section, page, text
from latentact.reporting.lam_sections import (
    codebook_section,
    lam_section,
    map_section,
    other_lams_section,
    prediction_section,
    probe_section,
    transfer_section,
)
from latentact.reporting.learner_section import learner_section
from latentact.reporting.run_data import Findings, LamRun, find
from latentact.reporting.sections import (
    comparison_section,
    config_section,
    curve_section,
    rollout_section,
    vla_section,
)


def build_report(run_dir: Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` into `run_dir` and return the first's content.

    It contains all files of known names below the folder: LAM runs, comparisons, learning curves,
    rollouts and LeRobot's evaluations with videos, VLAs, configurations. Missing parts are listed in one
    sentence each.

    Raises:
        UserError: the folder is missing, holds nothing to report or a damaged file; or plotly is missing.
    """
    found = find(Path(run_dir))
    whole = _page(found)
    lam = found.lams[0] if found.lams else None
    content = {
        "run": found.name,
        "wall_s": found.wall_s,
        "verdict": _verdict(found),
        "lam": lam.numbers if lam else None,
        "lams": {run.path: run.numbers for run in found.lams},
        "learners": {run.path: {"env": run.env, "verdict": run.verdict} for run in found.learners},
        "vlas": {run.path: run.numbers for run in found.vlas},
        "finetuned_vlas": {run.path: run.numbers for run in found.finetuned},
        "rollouts": {
            run.path: {
                name: run.numbers.get(name) for name in ("env", "success", "ci95", "return", "episodes")
            }
            for run in found.rollouts
        },
        "lerobot_evals": {run.path: run.numbers for run in found.evaluations},
        "comparison": [{"env": c.env, **row} for c in found.comparisons for row in c.content],
    }
    with atomic_write(Path(run_dir) / "report.html") as partial:
        partial.write_text(whole, encoding="utf-8")
    write_json(Path(run_dir) / "report.json", content)
    return content


def _page(found: Findings) -> str:
    sections, absent = _sections(found)
    if absent:
        sections.append(Section(anchor="absent", title="Not in this report", what=" ".join(absent), body=""))
    headline, rest = _split(_verdict(found))
    return page(
        command="report",
        name=found.name,
        headline=headline,
        lead=f'<p class="lead">{text(rest)}</p>' if rest else "",
        numbers=_headline_numbers(found),
        sections=sections,
    )


def _sections(found: Findings) -> tuple[list[Section], list[str]]:
    """Return the available sections in reading order, and a sentence for each missing one."""
    parts: list[Section | str] = [comparison_section(c, i) for i, c in enumerate(found.comparisons)]
    parts += [learner_section(run, i) for i, run in enumerate(found.learners)]
    if not parts:
        parts.append("No comparison of methods was run.")
    parts.append(rollout_section(found))
    if found.lams:
        lam = found.lams[0]
        makers = (
            lam_section,
            prediction_section,
            transfer_section,
            probe_section,
            map_section,
            codebook_section,
        )
        parts += [make(lam) for make in makers]
        if len(found.lams) > 1:
            parts.append(other_lams_section(found.lams))
    else:
        parts.append("No latent action model was evaluated.")
    parts += [vla_section(found)] if found.vlas or found.finetuned else []
    parts += [curve_section(found), config_section(found)]
    return [p for p in parts if isinstance(p, Section)], [p for p in parts if isinstance(p, str)]


def _verdict(found: Findings) -> str:
    """Return the verdict: the winner of the comparison, or else the quality of the latent action model."""
    if len(found.comparisons) == 1:
        return found.comparisons[0].verdict
    if found.comparisons:
        return " ".join(f"On {c.env}, {c.verdict}" for c in found.comparisons)
    if found.learners:
        return " ".join(run.verdict for run in found.learners)
    if found.lams:
        return _lam_verdict(found.lams[0])
    if found.vlas:
        return found.vlas[0].numbers.get("verdict") or f"{found.vlas[0].path} has not been evaluated yet."
    if found.rollouts or found.evaluations:
        return f"{found.name} has rollouts, but no comparison of methods."
    if found.finetuned:
        return finetuning(found.finetuned[0].numbers)
    return f"{found.name} has not been evaluated yet. Learning curves are below."


def _lam_verdict(lam: LamRun) -> str:
    numbers = lam.numbers
    recon, copy, shuffled = numbers["recon_mse"], numbers["copy_mse"], numbers["shuffled_mse"]
    warnings = numbers.get("warnings") or []
    summary = (
        "The latent action model has warnings to read first."
        if warnings
        else "The latent action model works."
    )
    sentences = [summary]
    if copy > 0 and recon > 0:
        sentences.append(
            f"Its error is {recon / copy:.1%} of that of copying the last frame, and "
            f"{shuffled / recon:.1f} times as large with another timestep's latent."
        )
    probes = numbers.get("probes") or {}
    if probes:
        best = max(probes["latent_linear"]["score"], probes["latent_mlp"]["score"])
        floor = probes["state_only"]["score"]
        sentences.append(
            f"A probe predicts the action with a score of {best:.2f} from latents, {floor:.2f} without."
        )
    return " ".join([*sentences, *warnings])


def _headline_numbers(found: Findings) -> list[tuple[str, str, str]]:
    items = []
    for comparison in found.comparisons[:1]:
        results = aggregate(comparison.rows)
        fewest = min((r.k for r in results if r.k is not None), default=None)
        measure = "return" if any(r.success is None for r in results) else "success"
        for name, methods in (
            (f"Best latent policy, {measure}", LATENT),
            ("Best baseline, same labels", BASELINES),
        ):
            candidates = [r for r in results if r.method in methods and r.k == fewest]
            if candidates:
                best = max(candidates, key=lambda r: r.score)
                items.append((name, f"{best.score:.2f}", f"{best.label}, k = {best.k}"))
        oracle = next((r for r in results if r.method == "oracle"), None)
        if oracle is not None:
            items.append(("Oracle, all labels", f"{oracle.score:.2f}", "the ceiling of this network"))
    if found.wall_s is not None:
        items.append(("Duration of the run", _duration(found.wall_s), "on this machine"))
    return items


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _split(sentence: str) -> tuple[str, str]:
    """Split a verdict into a headline, up to its first colon or full stop, and the remaining sentences."""
    first, *rest = re.split(r"[:.] ", sentence.removesuffix("."), maxsplit=1)
    return f"{first}.", "".join(f"{part[:1].upper()}{part[1:]}." for part in rest)
