"""Check a dataset before training on it: `latentact check-data PATH`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentact.config import Limit, check_bounds
from latentact.data.check import DataCheck, check_data
from latentact.data.locate import resolve_dataset
from latentact.reporting.pages.data import write_page


@dataclass(frozen=True, kw_only=True)
class CheckDataConfig:
    """Check a dataset before training on it."""

    path: str
    """LeRobot dataset, folder of videos or npz episodes, one file, or hub id of a dataset."""
    camera: str = ""
    """Camera key; empty: all of them."""
    max_frames: Limit = 20_000
    """Frames to decode per camera, from episodes spread over the data; 0: none."""
    no_strict: bool = False
    """Whether to skip truncated, altered and missing shards instead of reporting an error."""
    html: str = ""
    """File for a page with a contact sheet; empty: none."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)


def run(config: CheckDataConfig) -> DataCheck:
    """Check the dataset, and write the page if `html` is set."""
    check, sheets = check_data(
        resolve_dataset(config.path), config.camera, config.max_frames, config.no_strict
    )
    if config.html:
        write_page(Path(config.html), check, sheets)
    return check
