"""Say what a dataset is and what readers will do with it: `latentact check-data PATH`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentact.data.check import DataCheck, check_data
from latentact.errors import UserError
from latentact.reporting.pages.data import write_page


@dataclass(frozen=True, kw_only=True)
class CheckDataConfig:
    """Look at a dataset before hours are spent on it."""

    path: str
    """LeRobot dataset, folder of videos or npz episodes, or one file."""
    camera: str = ""
    """Camera key; empty: all of them."""
    max_frames: int = 20_000
    """Frames to decode of each camera, of episodes spread over the data; 0: none."""
    html: str = ""
    """File of the page with a contact sheet; empty: none."""

    def __post_init__(self) -> None:
        """Check the number."""
        if self.max_frames < 0:
            raise UserError(f"--max-frames must be at least 0, got {self.max_frames}.")


def run(config: CheckDataConfig) -> DataCheck:
    """Look at the dataset, and write the page if one is named."""
    check, sheets = check_data(Path(config.path).expanduser(), config.camera, config.max_frames)
    if config.html:
        write_page(Path(config.html), check, sheets)
    return check
