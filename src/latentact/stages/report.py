"""Write the report of a run, as a page and as JSON: `latentact report RUN_DIR`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from latentact.reporting.pages.run import build_report

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the report of a run."""

    run_dir: str
    """Folder of a LAM run, a comparison or a demo."""


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Files and verdict of a report."""

    html: Path
    """The page."""
    json: Path
    """File with the data of the page."""
    verdict: str
    """First line of the page."""


def run(config: ReportConfig) -> ReportResult:
    """Write `report.html` and `report.json` for everything below the run folder.

    Raises:
        UserError: the folder is missing, has nothing to report, or has a damaged file.
    """
    run_dir = Path(config.run_dir)
    content = build_report(run_dir)
    logger.info("report: %s", run_dir / "report.html")
    return ReportResult(
        html=run_dir / "report.html", json=run_dir / "report.json", verdict=str(content["verdict"])
    )
