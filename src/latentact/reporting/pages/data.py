"""The page of `latentact check-data`: a summary of a dataset, its warnings, and a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from latentact.io.atomic import atomic_write
from latentact.reporting.html import Section, figure, fold, image, page, table, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from latentact.data.check import DataCheck
    from latentact.data.check_frames import Sheet


_HEIGHT = 160


def write_page(path: Path, check: DataCheck, sheets: Sequence[Sheet]) -> None:
    """Write the page, which works offline.

    Args:
        path: output file.
        check: findings.
        sheets: frames of some episodes.

    Raises:
        UserError: plotly is missing.
    """
    made = (_issues(check), _sheet(sheets), _cameras(check), _columns(check), _files(check))
    whole = page(
        command="check-data",
        name=Path(check.path).name,
        headline=check.verdict,
        lead=f'<p class="lead">{text(summary(check))}</p>',
        numbers=_numbers(check),
        sections=[section for section in made if section is not None],
    )
    with atomic_write(path) as partial:
        partial.write_text(whole, encoding="utf-8", errors="backslashreplace")


def summary(check: DataCheck) -> str:
    """Return a description of the dataset in one sentence."""
    if not check.episodes:
        return f"{check.path} cannot be opened."
    names = [camera["key"] for camera in check.cameras if camera["key"]]
    parts = [check.kind, f"camera{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else ""]
    parts += [f"actions of {check.actions}" if check.actions else "no actions"]
    tasks = check.tasks
    parts += [f"task {tasks[0]!r}" if len(tasks) == 1 else f"{len(tasks) or 'no'} task texts"]
    return f"{'; '.join(part for part in parts if part)}."


def _numbers(check: DataCheck) -> list[tuple[str, str, str]]:
    if not check.episodes:
        return []
    rate = "varies" if check.rate["varies"] else "frames per second"
    return [
        (
            "Episodes",
            str(check.episodes["count"]),
            f"{check.episodes['shortest']} to {check.episodes['longest']} frames",
        ),
        ("Frames", str(check.episodes["frames"]), f"{check.episodes['seconds']:.0f} s"),
        ("Rate", f"{check.rate['fps']:g}", rate),
        ("Unreadable", str(len(check.unreadable)), "files and episodes"),
        ("Skipped", str(len(check.skipped)), "files"),
    ]


def _issues(check: DataCheck) -> Section:
    found = [*check.errors, *check.warnings]
    body = "".join(f"<li>{text(line)}</li>" for line in found)
    return Section(
        anchor="issues",
        title="Warnings",
        what="Data that readers reject, skip or repair."
        if found
        else "Nothing is rejected, skipped or repaired.",
        body=f"<ul>{body}</ul>" if found else "",
    )


def _sheet(sheets: Sequence[Sheet]) -> Section | None:
    if not sheets:
        return None
    figures = []
    for sheet in sheets:
        frames = [
            frame if frame.shape[2] == 3 else frame[..., :1].repeat(3, axis=2) for frame in sheet.frames
        ]
        shown = np.concatenate([_thumbnail(frame) for frame in frames], axis=1)
        name = f"{sheet.episode} {sheet.camera}"
        figures.append(figure(image(shown, f"frames of {name}"), name))
    return Section(
        anchor="sheet",
        title="Contact sheet",
        what="First, middle and last frame of some episodes. Check that they are upright and that their "
        "colors are right.",
        body=f'<div class="sheet">{"".join(figures)}</div>',
    )


def _thumbnail(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Return a frame at a height of `_HEIGHT` pixels."""
    width = max(1, round(frame.shape[1] * _HEIGHT / frame.shape[0]))
    kind = Image.Resampling.NEAREST if frame.shape[0] < _HEIGHT else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(frame).resize((width, _HEIGHT), kind))


def _cameras(check: DataCheck) -> Section | None:
    if not check.cameras:
        return None
    head = ("Camera", "Size", "Codec", "Pixel format", "Color matrix", "Rotated or mirrored")
    names = ("size", "codec", "pixel_format", "matrix")
    rows = [
        (
            text(camera["key"] or "video"),
            [
                *(text(", ".join(camera[name]) or "images") for name in names),
                str(camera["rotated_or_mirrored"]),
            ],
            False,
        )
        for camera in check.cameras
    ]
    return Section(
        anchor="cameras",
        title="Cameras",
        what="As the videos are stored. A matrix that is not specified is read as BT.601, as FFmpeg does.",
        body=table(head, rows, "cameras"),
    )


def _columns(check: DataCheck) -> Section | None:
    if not check.columns:
        return None
    rows = [
        (text(name), [text(found["shape"] or "scalar"), str(found["rows"]), str(found["nonfinite"])], False)
        for name, found in check.columns.items()
    ]
    return Section(
        anchor="columns",
        title="Columns",
        what="Numeric columns, and how many of their rows are missing, NaN or infinite.",
        body=table(("Column", "Shape", "Rows", "Not finite"), rows, "columns"),
    )


def _files(check: DataCheck) -> Section | None:
    if not check.unreadable and not check.skipped and not check.still and not check.duplicates:
        return None
    still = {
        f"{span['episode']} {span['camera']}": f"{span['from_s']:.1f} to {span['to_s']:.1f} s"
        for span in check.still
    }
    alike = {names[0]: ", ".join(names[1:]) for names in check.duplicates}
    parts = (
        ("Unreadable", check.unreadable),
        ("Skipped", check.skipped),
        ("Without a change", still),
        ("Alike", alike),
    )
    return Section(
        anchor="files",
        title="Files and episodes",
        what="By name, with the reason.",
        body="".join(fold(f"{title} ({len(names)})", _list(names)) for title, names in parts if names),
    )


def _list(names: Mapping[str, Any]) -> str:
    return "<ul>" + "".join(f"<li>{text(name)}: {text(why)}</li>" for name, why in names.items()) + "</ul>"
