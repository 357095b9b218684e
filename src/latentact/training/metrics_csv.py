"""`metrics.csv`: one row per logged step, columns as they come, whole at any moment."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from latentact.io.atomic import atomic_write


class MetricsCsv(Logger):
    """Writes `metrics.csv` into a run folder; a resumed run keeps the rows up to its first step.

    Args:
        out: run folder.
        start: step from which the run goes on; rows after it are forgotten.
    """

    def __init__(self, out: Path, start: int = 0) -> None:
        super().__init__()
        self.path = out / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        if start and self.path.exists():
            with self.path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if int(row["step"]) <= start:
                        self.rows[int(row["step"])] = {k: v for k, v in row.items() if v}

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version of the logger: there is one file."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Ignore them: `config.yaml` holds them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step and rewrite the file."""
        assert step is not None
        self.rows.setdefault(step, {"step": step}).update({k: f"{v:.6g}" for k, v in metrics.items()})
        columns = dict.fromkeys(k for row in self.rows.values() for k in row)
        with atomic_write(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*columns])
            writer.writeheader()
            writer.writerows(self.rows[s] for s in sorted(self.rows))
