"""The page of `latentact preview-augment`: clips before and after augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from latentact.data.transforms import AugmentConfig
from latentact.io.atomic import atomic_write
from latentact.reporting.html import Section, figure, image, page, table

_HEIGHT = 96
"""Height of a shown frame in pixels."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Clips of a dataset with their augmented copies."""

    data: str
    """The dataset."""
    settings: AugmentConfig
    """The augmentation."""
    before: UInt8[np.ndarray, "n t h w c"]
    """Clips as they are."""
    after: UInt8[np.ndarray, "n draws t h w c"]
    """Draws of each clip."""
    alone: dict[str, UInt8[np.ndarray, "draws t h w c"]]
    """Draws of the first clip with one setting only, by setting."""
    state_std: list[float] | None
    """Standard deviation of each dimension of the robot state; None without a state."""


def write_page(path: Path, preview: Preview) -> None:
    """Write the page, which works offline.

    Raises:
        UserError: plotly is missing.
    """
    count, draws = preview.after.shape[:2]
    height, width = preview.before.shape[2:4]
    whole = page(
        command="preview-augment",
        name=Path(preview.data).name,
        headline=f"Augmentation: {preview.settings}",
        lead='<p class="lead">All frames of a clip get the same draw. Targets and evaluation are not '
        "augmented.</p>",
        numbers=[
            ("Clips", str(count), f"{draws} draws of each"),
            ("Frames", f"{width} x {height}", "pixels"),
        ],
        sections=[
            _section(
                "together", "Together", "Each clip before and after, with all settings.", _together(preview)
            ),
            _section("alone", "One by one", "The first clip with one setting at a time.", _alone(preview)),
            *([_state(preview)] if preview.settings.state_noise and preview.state_std else []),
        ],
    )
    with atomic_write(path) as partial:
        partial.write_text(whole, encoding="utf-8", errors="backslashreplace")


def _section(anchor: str, title: str, what: str, figures: list[str]) -> Section:
    return Section(anchor=anchor, title=title, what=what, body=f'<div class="sheet">{"".join(figures)}</div>')


def _together(preview: Preview) -> list[str]:
    pairs = zip(preview.before, preview.after, strict=True)
    return [
        figure(image(_rows([clip, *draws]), f"clip {i}"), f"Clip {i}: before, then {len(draws)} draws")
        for i, (clip, draws) in enumerate(pairs)
    ]


def _alone(preview: Preview) -> list[str]:
    return [figure(image(_rows([*draws]), name), name) for name, draws in preview.alone.items()]


def _state(preview: Preview) -> Section:
    assert preview.state_std is not None
    noise = preview.settings.state_noise
    rows = [(str(i), [f"{std:.4g}", f"{noise * std:.4g}"], False) for i, std in enumerate(preview.state_std)]
    return Section(
        anchor="state",
        title="State",
        what="Standard deviation of each dimension of the robot state and of its noise, in the units of the "
        "data.",
        body=table(("Dimension", "Data", "Noise"), rows, "state"),
    )


def _rows(clips: list[UInt8[np.ndarray, "t h w c"]]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Return an image with one row of frames per clip."""
    return np.concatenate([np.concatenate([_shown(frame) for frame in clip], 1) for clip in clips], 0)


def _shown(frame: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Return a color frame at a height of `_HEIGHT` pixels, each with a border."""
    color = frame if frame.shape[2] == 3 else frame[..., :1].repeat(3, axis=2)
    width = max(1, round(frame.shape[1] * _HEIGHT / frame.shape[0]))
    shown = np.asarray(Image.fromarray(color).resize((width, _HEIGHT), Image.Resampling.NEAREST))
    return np.pad(shown, ((2, 2), (2, 2), (0, 0)), constant_values=255)
