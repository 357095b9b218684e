"""`latentact report RUN_DIR`: what a run reached, as one page for people and one json for programs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from latentact.reporting.pages.run import build_report

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Where the report lies and what it says."""

    html: Path
    """The page."""
    json: Path
    """The same numbers for programs."""
    verdict: str
    """First line of the page."""


def run(run_dir: Path) -> ReportResult:
    """Write `report.html` and `report.json` into `run_dir`, from everything below it that a report knows.

    Raises:
        UserError: the folder is missing, holds nothing to report, or holds a damaged file.
    """
    run_dir = Path(run_dir)
    content = build_report(run_dir)
    logger.info("report: %s", run_dir / "report.html")
    return ReportResult(
        html=run_dir / "report.html", json=run_dir / "report.json", verdict=str(content["verdict"])
    )
