"""`metrics.csv`: one row per logged step, columns in order of appearance, written atomically."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from latentact.errors import UserError
from latentact.io.atomic import atomic_write


class MetricsCsv(Logger):
    """Write `metrics.csv` into a run folder; a resumed run keeps the rows up to its first step.

    Args:
        out: run folder.
        start: step at which the run resumes; later rows are removed.
    """

    def __init__(self, out: Path, start: int = 0) -> None:
        super().__init__()
        self.path = out / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        if start and self.path.exists():
            self.rows = {step: row for step, row in _read(self.path).items() if step <= start}

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version of the logger: there is one file."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` has the hyperparameters."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step and rewrite the file."""
        assert step is not None
        self.rows.setdefault(step, {"step": step}).update({k: f"{v:.6g}" for k, v in metrics.items()})
        columns = dict.fromkeys(k for row in self.rows.values() for k in row)
        with atomic_write(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*columns])
            writer.writeheader()
            writer.writerows(self.rows[s] for s in sorted(self.rows))


def _read(path: Path) -> dict[int, dict[str, Any]]:
    try:
        with path.open(newline="") as file:
            rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
        return {int(row["step"]): row for row in rows}
    except (OSError, ValueError, LookupError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as the table of this run ({error}); delete the file, and the run resumes."
        ) from error
