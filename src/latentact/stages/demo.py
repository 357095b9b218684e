"""The whole pipeline in one command: `latentact demo`, which `make demo` runs.

Collects demonstrations, hides their actions except those of k episodes, and compares the policy learned from
video with plain baselines. Stages exchange artifacts on disk, so a killed demo resumes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from latentact.composition import load_experiment
from latentact.config import Count, Seed
from latentact.data.splits import choose_labeled, split_sizes
from latentact.io.atomic import read_object, write_json
from latentact.io.records import read_record
from latentact.reporting.run_data import DemoRecord
from latentact.stages import collect, compare, report

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Collect, learn a LAM, label, learn policies, ground, roll out, compare, report."""

    out: str = "runs/demo"
    """Run folder; re-run the same command to resume."""
    experiment: str = "babyai"
    """Experiment of `compare` with environment, models and training."""
    episodes: Count = 1500
    """Demonstrations to collect."""
    k: Count = 5
    """Labeled episodes."""
    seed: Seed = 0
    """Seed of collection and comparison."""
    overrides: tuple[str, ...] = ()
    """Further settings of `compare`, as on its command line."""


def run(config: DemoConfig) -> report.ReportResult:
    """Run all unfinished stages and return the report."""
    out, begun = Path(config.out), time.monotonic()
    spent = read_record(DemoRecord, out / "demo.json").wall_s if (out / "demo.json").exists() else 0.0
    data = out / "data"
    fixed = [f"data.path={data}", f"ks=[{config.k}]", f"seeds=[{config.seed}]", f"out={out / 'compare'}"]
    comparison = load_experiment(
        "compare", compare.CompareConfig, [f"experiment={config.experiment}", *fixed, *config.overrides]
    )
    choose_labeled(range(split_sizes(config.episodes, comparison.held_out)[0]), config.k, config.seed)
    demonstrations = collect.CollectConfig(
        env=comparison.env, out=str(data), episodes=config.episodes, seed=config.seed, view=comparison.view
    )
    finished = _compared(out / "compare" / "comparison.json", config)
    for stage in (lambda: collect.run(demonstrations), lambda: compare.run(comparison, out / "compare")):
        stage()
        if not finished:
            write_json(out / "demo.json", {"wall_s": spent + time.monotonic() - begun})
    return report.run(report.ReportConfig(run_dir=config.out))


def _compared(file: Path, config: DemoConfig) -> bool:
    """Return whether a comparison has the rows of this k and seed, so that nothing is trained again."""
    if not file.exists():
        return False
    ks = {row["k"] for row in read_object(file)["rows"] if row["seed"] == config.seed}
    return ks == {None} or config.k in ks
