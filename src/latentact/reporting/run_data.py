"""Content of a report: the files of known names below a run folder."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
from pydantic import ConfigDict, Field

from latentact.errors import UserError
from latentact.evaluation.policy.comparison import Row, verdict
from latentact.evaluation.policy.intervals import success_interval
from latentact.io.arrays import load_npz
from latentact.io.atomic import read_json
from latentact.io.records import Record, parse_record, read_record

Count = Annotated[int, Field(ge=0, le=1 << 40)]
Measure = Annotated[float, Field(ge=-1e100, le=1e100)]
Interval = Annotated[list[Measure], Field(min_length=2, max_length=2)]


class DemoRecord(Record):
    """`demo.json`."""

    wall_s: Annotated[float, Field(ge=0, le=1e10)]
    """Seconds that the stages took."""


class _Generative(Record):
    generative: bool = True


class _Codebook(Record):
    size: Annotated[int, Field(ge=1, le=1 << 20)]
    used: Count
    dead: Count
    perplexity: Measure


class _Probe(Record):
    score: Measure
    metric: str
    ci95: Interval | None = None


class _Probes(Record):
    latent_linear: _Probe
    latent_mlp: _Probe
    state_only: _Probe
    shuffled_future: _Probe | None = None
    state_change: _Probe | None = None
    state_change_state_only: _Probe | None = None


class _NoProbes(Record):
    model_config = ConfigDict(extra="forbid")


class _LamRecord(Record):
    """`lam.json` of a model that predicts frames."""

    recon_mse: Measure
    copy_mse: Measure
    shuffled_mse: Measure
    probes: _NoProbes | _Probes | None = None
    codebook: _Codebook | None = None
    warnings: tuple[str, ...] = Field((), strict=False)
    action_names: tuple[str, ...] = Field((), strict=False)


class _Before(Record):
    success: Annotated[float, Field(ge=0, le=1)] | None
    mean_return: Measure = Field(alias="return")
    ci95: Interval | None = None
    return_ci95: Interval | None = None


class _ComparisonRow(_Before):
    method: str
    k: Count | None
    seed: int
    episodes: Annotated[int, Field(ge=1, le=10**6)]
    successes: tuple[int | bool, ...] = Field((), strict=False)
    run: str = ""
    updates: Count | None = None
    decoder_only: _Before | None = None


class _ComparisonRecord(Record):
    """`comparison.json`."""

    rows: Annotated[list[_ComparisonRow], Field(min_length=1)]
    verdict: str = ""


class _RolloutRecord(Record):
    """`rollout.json`."""

    success: Measure | None = None
    mean_return: Measure | None = Field(None, alias="return")
    ci95: Interval | None = None
    return_ci95: Interval | None = None
    episodes: Count = 0
    successes: Annotated[tuple[int | bool, ...], Field(strict=False)] | None = ()


class _EvalScores(Record):
    pc_success: Annotated[float, Field(ge=0, le=100)]
    avg_sum_reward: Measure
    n_episodes: Annotated[int, Field(ge=1, le=10**6)]

    def numbers(self) -> dict[str, Any]:
        """Return the scores with the names of `rollout.json`."""
        n = self.n_episodes
        won = round(self.pc_success / 100 * n)
        interval = list(success_interval([1] * won + [0] * (n - won)))
        return {"success": won / n, "ci95": interval, "return": self.avg_sum_reward, "episodes": n}


class _EvalRecord(Record):
    """`eval_info.json` of LeRobot's `lerobot-eval`."""

    overall: _EvalScores
    per_group: dict[str, _EvalScores] = Field(default_factory=dict)


class _TunedL1(Record):
    """`finetune_vla.json` of continuous actions."""

    labeled_steps: Count
    labeled_episodes: Count
    held_out_l1: Annotated[list[Measure], Field(min_length=1)]
    mean_action_l1: Annotated[list[Measure], Field(min_length=1)]


class _TunedAccuracy(Record):
    """`finetune_vla.json` of discrete actions."""

    labeled_steps: Count
    labeled_episodes: Count
    held_out_accuracy: Measure
    majority_accuracy: Measure


class _VlaRecord(Record):
    """`vla.json`."""

    metric: str = ""
    score: Measure | None = None
    baselines: dict[str, Measure] = Field(default_factory=dict)
    controls: dict[str, Measure] = Field(default_factory=dict)
    verdict: str = ""


class _LearnerRow(Record):
    method: str
    labels: Count | None = None
    seed: int
    run: str
    episodes: Annotated[int, Field(ge=1, le=10**6)]
    played: Count | None = None
    successes: Annotated[tuple[int | bool, ...], Field(min_length=1, strict=False)] | None
    returns: Annotated[tuple[Measure, ...], Field(min_length=1, strict=False)]


class _LearnerRecord(Record):
    """`learner.json`."""

    learner: str
    env: str
    verdict: str
    rows: Annotated[list[_LearnerRow], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class LearnerRun:
    """A learner and its baselines."""

    path: str
    """Its folder, relative to the run folder."""
    learner: str
    """Registered name."""
    env: str
    """Environment."""
    verdict: str
    """What came out, in plain words."""
    rows: list[dict[str, Any]]
    """A row per policy and seed."""


@dataclass(frozen=True, kw_only=True)
class VlaRun:
    """A trained or fine-tuned vision-language-action model."""

    path: str
    """Its folder, relative to the run folder."""
    numbers: dict[str, Any]
    """`vla.json` or `finetune_vla.json`."""


@dataclass(frozen=True, kw_only=True)
class LamRun:
    """An evaluated latent action model."""

    path: str
    """Its folder, relative to the run folder."""
    numbers: dict[str, Any]
    """`lam.json`."""
    arrays: dict[str, np.ndarray]
    """Arrays of `lam.npz`; empty if there is none."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished comparison."""

    path: str
    """Its folder, relative to the run folder."""
    env: str
    """Environment of the rollouts."""
    content: list[dict[str, Any]]
    """The rows of `comparison.json`."""
    rows: list[Row]
    """The same as records."""
    verdict: str
    """Who wins."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The learning curves of one training run."""

    path: str
    """Its folder, relative to the run folder."""
    series: dict[str, tuple[list[float], list[float]]]
    """Metric -> steps at which it was measured, and values."""


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """A policy in an environment, run by `rollout` or by LeRobot's `lerobot-eval`."""

    path: str
    """Its folder, relative to the run folder."""
    numbers: dict[str, Any]
    """`rollout.json`, or `eval_info.json` with the same names and `groups`, those of its tasks."""
    videos: list[Path]
    """One per recorded episode, in order."""


@dataclass(kw_only=True)
class Findings:
    """Everything below a run folder that a report can show."""

    name: str
    """Name of the run folder."""
    lams: list[LamRun] = field(default_factory=list)
    """The least nested first."""
    comparisons: list[Comparison] = field(default_factory=list)
    """In the order of their paths."""
    curves: list[Curves] = field(default_factory=list)
    """In the order of their paths."""
    rollouts: list[RolloutRecord] = field(default_factory=list)
    """In the order of their paths."""
    evaluations: list[RolloutRecord] = field(default_factory=list)
    """By LeRobot's `lerobot-eval`, in the order of their paths."""
    vlas: list[VlaRun] = field(default_factory=list)
    """In the order of their paths."""
    finetuned: list[VlaRun] = field(default_factory=list)
    """Fine-tuned models, in the order of their paths."""
    learners: list[LearnerRun] = field(default_factory=list)
    """In the order of their paths."""
    configs: dict[str, str] = field(default_factory=dict)
    """Folder -> text of its `config.yaml`."""
    wall_s: float | None = None
    """Duration of the whole run in seconds, from `demo.json`."""

    def empty(self) -> bool:
        """Whether there is nothing to report."""
        parts = (self.lams, self.comparisons, self.curves, self.rollouts, self.vlas, self.learners)
        return not any((*parts, self.evaluations, self.finetuned))


def find(run_dir: Path) -> Findings:
    """Read the results below `run_dir`, except in hidden folders.

    Raises:
        UserError: the folder is missing, holds nothing to report, or a file in it is damaged.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a folder; give the folder of a run, for example runs/demo.")
    found = Findings(name=run_dir.resolve().name)
    for path in sorted(run_dir.rglob("*")):
        where = path.relative_to(run_dir)
        if any(part.startswith(".") for part in where.parts) or not path.is_file():
            continue
        folder = where.parent.as_posix()
        if path.name == "lam.json":
            lam = _lam(path, folder)
            found.lams += [lam] if lam else []
        elif path.name == "comparison.json":
            found.comparisons.append(_comparison(path, folder))
        elif path.name == "metrics.csv":
            found.curves.append(_curves(path, folder))
        elif path.name == "rollout.json":
            videos = sorted(path.parent.glob("episode_*.mp4"))
            numbers = _mapping(path)
            parse_record(_RolloutRecord, numbers, str(path))
            found.rollouts.append(RolloutRecord(path=folder, numbers=numbers, videos=videos))
        elif path.name == "eval_info.json":
            record = read_record(_EvalRecord, path)
            groups = {name: scores.numbers() for name, scores in record.per_group.items()}
            numbers = record.overall.numbers() | {"groups": groups}
            videos = path.parent.glob("videos/**/eval_episode_*.mp4")
            videos = sorted(videos, key=lambda file: (file.name, file))  # the first of every task first
            found.evaluations.append(RolloutRecord(path=folder, numbers=numbers, videos=videos))
        elif path.name == "finetune_vla.json":
            numbers = _mapping(path)
            parse_record(_TunedL1 if "held_out_l1" in numbers else _TunedAccuracy, numbers, str(path))
            found.finetuned.append(VlaRun(path=folder, numbers=numbers))
        elif path.name == "vla.json":
            numbers = _mapping(path)
            if parse_record(_VlaRecord, numbers, str(path)).score is not None:
                found.vlas.append(VlaRun(path=folder, numbers=numbers))
        elif path.name == "learner.json":
            numbers = _mapping(path)
            record = parse_record(_LearnerRecord, numbers, str(path))
            about = {"learner": record.learner, "env": record.env, "verdict": record.verdict}
            found.learners.append(LearnerRun(path=folder, rows=numbers["rows"], **about))
        elif path.name == "config.yaml":
            found.configs[folder] = path.read_text(errors="replace")
    found.lams.sort(key=lambda lam: lam.path.count("/"))
    made = [name for name in ("inspect.html", "report.html") if (run_dir / name).is_file()]
    if found.empty() and made:
        raise UserError(f"{run_dir} holds nothing to report but its own page; open {run_dir / made[0]}.")
    if found.empty():
        raise UserError(
            f"{run_dir} holds nothing to report (no lam.json, comparison.json, metrics.csv, rollout.json or "
            "eval_info.json); give the folder of a finished run."
        )
    if (run_dir / "demo.json").is_file():
        found.wall_s = read_record(DemoRecord, run_dir / "demo.json").wall_s
    return found


def _mapping(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object; re-run the command that writes it.")
    return values


def _lam(path: Path, folder: str) -> LamRun | None:
    """Return a LAM run; None for a model that predicts no frames."""
    numbers = _mapping(path)
    if not parse_record(_Generative, numbers, str(path)).generative:
        return None
    record = parse_record(_LamRecord, numbers, str(path))
    archive = path.with_name("lam.npz")
    arrays = _arrays(archive) if archive.is_file() else {}
    codes, size = arrays.get("codes"), record.codebook.size if record.codebook else 0
    if codes is not None and codes.size and size and not 0 <= codes.min() <= codes.max() < size:
        raise UserError(
            f"{archive} must hold codes from 0 to {size - 1}, got {codes.min()} to {codes.max()}; evaluate "
            f"the latent action model again."
        )
    return LamRun(path=folder, numbers=numbers, arrays=arrays)


def _arrays(archive: Path) -> dict[str, np.ndarray]:
    """Return the arrays of known names if their shapes agree."""
    arrays = load_npz(archive, "evaluate the latent action model again", ARRAYS)
    sizes: dict[str, int] = {"3": 3, "2": 2}
    for name, array in arrays.items():
        kinds, axes = ARRAYS[name]
        named = axes.split()[: array.ndim] if name == "action" else axes.split()
        fits = array.dtype.kind in kinds and array.ndim == len(named)
        if fits:
            fits = all(
                sizes.setdefault(a, n) == n or a in "hw" for a, n in zip(named, array.shape, strict=True)
            )
        if not fits or (array.dtype.kind == "f" and name != "action" and not np.isfinite(array).all()):
            raise UserError(
                f"{archive} must hold finite numbers [{axes}] as {name!r}, got {array.dtype} "
                f"{list(array.shape)}; evaluate the latent action model again."
            )
    for group in TOGETHER:
        if (lacking := group - arrays.keys()) and lacking != group:
            raise UserError(
                f"{archive} must hold {', '.join(sorted(group))}, got no {min(lacking)}; evaluate the latent "
                f"action model again."
            )
    return arrays


ARRAYS = {
    "vectors": ("f", "m d"),
    "episode": ("i", "m"),
    "time": ("f", "m"),
    "action": ("if", "m a"),
    "codes": ("i", "m k"),
    **dict.fromkeys(("now", "next", "predicted"), ("u", "p h w 3")),
    "transfer_source": ("u", "i 2 h w 3"),
    "transfer_start": ("u", "j h w 3"),
    "transfer_grid": ("u", "i j h w 3"),
    "transfer_source_episode": ("i", "i"),
    "transfer_start_episode": ("i", "j"),
}
"""Arrays of `lam.npz` in a report -> dtype kinds and axes; actions may be classes."""
TOGETHER = (
    {"vectors", "episode", "time"},
    {"now", "next", "predicted"},
    {"transfer_source", "transfer_start", "transfer_grid"},
)


def _comparison(path: Path, folder: str) -> Comparison:
    values = _mapping(path)
    parse_record(_ComparisonRecord, values, str(path))
    content = list(values["rows"])
    rows = [Row.from_json(row) for row in content]
    sentence = values.get("verdict") or verdict(rows)
    env = ", ".join(filter(None, (str(values.get(name, "")) for name in ("env", "distract"))))
    return Comparison(path=folder, env=env, content=content, rows=rows, verdict=sentence)


def _curves(path: Path, folder: str) -> Curves:
    """Return the values of each column, without empty and non-finite cells and a truncated last line."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(newline="", errors="replace") as file:
        for line in _lines(file, path):
            step = _number(line.get("step"))
            for name, cell in line.items():
                value = _number(cell)
                if step is None or value is None or name in (None, "step", "epoch"):
                    continue
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return Curves(path=folder, series=series)


def _lines(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from csv.DictReader(file)
    except csv.Error as error:
        raise UserError(f"{path} is not a table ({error}); delete it, or copy it again.") from error


def _number(cell: str | list[str] | None) -> float | None:
    try:
        value = float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if abs(value) <= 1e100 else None
