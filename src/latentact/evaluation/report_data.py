"""What a report is made of: the files below a run folder that it knows by name."""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentact.errors import UserError
from latentact.evaluation.comparison import Row, verdict
from latentact.io.atomic import read_json


@dataclass(frozen=True, kw_only=True)
class LamRun:
    """A judged latent action model."""

    path: str
    """Its folder, relative to the run folder."""
    numbers: dict[str, Any]
    """`lam.json`."""
    arrays: dict[str, np.ndarray]
    """`lam.npz`; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished comparison."""

    path: str
    """Its folder, relative to the run folder."""
    env: str
    """What the methods were rolled out in."""
    content: list[dict[str, Any]]
    """The rows as they stand in `comparison.json`."""
    rows: list[Row]
    """The same, read."""
    verdict: str
    """Who wins."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The learning curves of one training run."""

    path: str
    """Its folder, relative to the run folder."""
    series: dict[str, tuple[list[float], list[float]]]
    """Metric -> steps and values, where it was measured."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A policy in an environment."""

    path: str
    """Its folder, relative to the run folder."""
    numbers: dict[str, Any]
    """`rollout.json`."""
    videos: list[Path]
    """One per filmed episode, in order."""


@dataclass(kw_only=True)
class Findings:
    """Everything below a run folder that a report can show."""

    name: str
    """Of the run folder."""
    lams: list[LamRun] = field(default_factory=list)
    """The least nested first."""
    comparisons: list[Comparison] = field(default_factory=list)
    """In the order of their paths."""
    curves: list[Curves] = field(default_factory=list)
    """In the order of their paths."""
    rollouts: list[Rollout] = field(default_factory=list)
    """In the order of their paths."""
    configs: dict[str, str] = field(default_factory=dict)
    """Folder -> text of its `config.yaml`."""
    wall_s: float | None = None
    """How long the whole run took, where `demo.json` says so."""

    def empty(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.lams or self.comparisons or self.curves or self.rollouts)


def find(run_dir: Path) -> Findings:
    """Read what lies below `run_dir`; hidden folders are left out.

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
            found.rollouts.append(Rollout(path=folder, numbers=_mapping(path), videos=videos))
        elif path.name == "config.yaml":
            found.configs[folder] = path.read_text(errors="replace")
    found.lams.sort(key=lambda lam: lam.path.count("/"))
    made = [name for name in ("inspect.html", "report.html") if (run_dir / name).is_file()]
    if found.empty() and made:
        raise UserError(f"{run_dir} holds nothing to report but its own page; open {run_dir / made[0]}.")
    if found.empty():
        raise UserError(
            f"{run_dir} holds nothing to report (no lam.json, comparison.json, metrics.csv or rollout.json); "
            "give the folder of a finished run."
        )
    if (run_dir / "demo.json").is_file():
        wall = _mapping(run_dir / "demo.json").get("wall_s")
        found.wall_s = float(wall) if isinstance(wall, int | float) else None
    return found


def _mapping(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a json object; run the command that writes it again.")
    return values


def _lam(path: Path, folder: str) -> LamRun | None:
    """A LAM run; None for one that predicts no frames."""
    numbers, arrays = _mapping(path), {}
    if not numbers.get("generative", True):
        return None
    missing = {"recon_mse", "copy_mse", "shuffled_mse"} - numbers.keys()
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; evaluate the latent action model again.")
    archive = path.with_name("lam.npz")
    if archive.is_file():
        try:
            with np.load(archive, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{archive} is damaged ({error}); evaluate the latent action model again."
            ) from error
    return LamRun(path=folder, numbers=numbers, arrays=arrays)


def _comparison(path: Path, folder: str) -> Comparison:
    values = _mapping(path)
    try:
        content = list(values["rows"])
        rows = [Row.from_json(row) for row in content]
        said = values.get("verdict") or verdict(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a comparison ({error!r}); run `latentact compare` again.") from error
    env = ", ".join(filter(None, (str(values.get(name, "")) for name in ("env", "distract"))))
    return Comparison(path=folder, env=env, content=content, rows=rows, verdict=said)


def _curves(path: Path, folder: str) -> Curves:
    """Numbers by column, without cells that are empty or not finite, or a line cut short by a kill."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(newline="", errors="replace") as file:
        for line in csv.DictReader(file):
            step = _number(line.get("step"))
            for name, cell in line.items():
                value = _number(cell)
                if step is None or value is None or name in (None, "step", "epoch"):
                    continue
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return Curves(path=folder, series=series)


def _number(cell: str | list[str] | None) -> float | None:
    try:
        value = float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None
