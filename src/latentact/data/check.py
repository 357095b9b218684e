"""Checks of a dataset before it is used: `latentact check-data`.

Tables and video packets are read, and up to a given number of frames are decoded at a small size. Whatever a
reader rejects, skips or repairs is reported here first, by the same functions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentact.data.cache import cache_folder
from latentact.data.check_frames import STILL_S, FrameFindings, Sheet, check_frames
from latentact.data.decode.color import SIXTEEN_BITS
from latentact.data.decode.video import VideoProperties, frame_times, video_properties
from latentact.data.digest import Memo
from latentact.data.format import CameraRequired, Source, Unreadable, open_source
from latentact.data.store import finite_rows
from latentact.data.time_base import LEROBOT_TOLERANCE_S, is_integer_rate
from latentact.errors import UserError


@dataclass(kw_only=True)
class DataCheck:
    """Findings of a check, as plain JSON values."""

    path: str
    kind: str = ""
    """Kind of the data, such as "LeRobot v2.1" or "folder of videos"."""
    cameras: list[dict[str, Any]] = field(default_factory=list)
    """One entry per camera: key, size, codec, color, orientation."""
    episodes: dict[str, Any] = field(default_factory=dict)
    """Number and lengths of the episodes."""
    rate: dict[str, Any] = field(default_factory=dict)
    """Frames per second, and whether the rate varies."""
    clocks: dict[str, int] = field(default_factory=dict)
    """Number of episodes by kind of `timestamp` column: regular, offset, gaps, jitter, impossible."""
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Numeric columns: shape, number of rows that are not finite, and the first of them."""
    tasks: list[str] = field(default_factory=list)
    actions: str = ""
    """Description of the action space; empty: no actions."""
    decoded_frames: int = 0
    """Number of frames that were decoded."""
    still: list[dict[str, Any]] = field(default_factory=list)
    """Spans in which nothing changes: episode, start and end in seconds."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of episodes with the same frames."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that are not read: name -> reason."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Files and episodes that cannot be read: name -> reason."""
    errors: list[str] = field(default_factory=list)
    """Reasons why the data cannot be used."""
    warnings: list[str] = field(default_factory=list)
    """Data that is skipped, repaired or inconsistent."""

    @property
    def usable(self) -> bool:
        """Whether a model can be trained on it."""
        return not self.errors

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if self.errors:
            return f"Not usable: {self.errors[0]}"
        many, frames = self.episodes["count"], self.episodes["frames"]
        size, count = f"{many} episodes, {frames} frames at {self.rate['fps']:g} fps", len(self.warnings)
        return (
            f"Ready: {size}."
            if not count
            else f"Usable with care ({count} warning{'s'[: count > 1]}): {size}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return all fields and the verdict."""
        return {"verdict": self.verdict, "usable": self.usable, **asdict(self)}


def check_data(
    path: Path, camera: str = "", max_frames: int = 20_000, no_strict: bool = False
) -> tuple[DataCheck, list[Sheet]]:
    """Check a dataset.

    Args:
        path: as `data.path`.
        camera: key of the camera; empty: all of them.
        max_frames: frames to decode of each camera, of episodes spread over the data; 0: none.
        no_strict: whether damaged shards are left out instead of making the data unusable.

    Returns:
        The findings, and frames for a contact sheet.
    """
    check, sheets, version = DataCheck(path=str(path)), [], ""
    try:
        for place, source in enumerate(_sources(path, camera)):
            if not place:
                _describe(check, source, no_strict)
                version = source.lerobot_version
            _check_camera(check, path, source)
            found = check_frames(source, max_frames)
            _add_frames(check, found)
            sheets += found.sheets
            if not place:
                _count(check, source)
        if check.unreadable:
            name, reason = next(iter(check.unreadable.items()))
            check.warnings.append(
                f"unreadable files and episodes, which are left out: {len(check.unreadable)}, such as "
                f"{name} ({reason}){_consequence(version, len(check.cameras))}"
            )
        if not check.episodes.get("count"):
            reasons = [*check.unreadable.values(), *check.skipped.values(), "it has no episodes"]
            check.errors.append(f"{path} holds no readable episodes ({reasons[0]}).")
    except UserError as error:
        check.errors.append(str(error))
    return check, sheets


def _consequence(lerobot_version: str, cameras: int) -> str:
    """Return the consequence of unreadable episodes for `precompute --output column`."""
    if lerobot_version.startswith("v3"):
        return "; precompute --output column keeps their rows and rejects those that LeRobot cannot read"
    if lerobot_version and cameras > 1:
        return "; precompute --output column rejects an episode of which another camera is unreadable"
    return ""


def _sources(path: Path, camera: str) -> Iterator[Source]:
    """Open the data with the given camera, or with one camera after the other."""
    try:
        yield open_source(path, camera, Memo(cache_folder() / "memo", path))
    except CameraRequired as error:
        for each in error.cameras:
            yield open_source(path, each, Memo(cache_folder() / "memo", path))


def _describe(check: DataCheck, source: Source, no_strict: bool) -> None:
    """Fill in the findings that do not depend on the camera."""
    check.kind = source.kind
    check.rate = {"fps": source.fps, "varies": source.uneven}
    check.tasks = list(source.tasks)
    check.actions = "" if source.action_space is None else str(source.action_space)
    check.skipped = dict(source.skipped)
    if source.damaged and not no_strict:
        name, reason = next(iter(source.damaged.items()))
        check.errors.append(
            f"{name} is damaged ({reason}); copy it again, or leave it out with --no-strict "
            f"(data.no_strict=true)."
        )
    check.warnings += source.notes
    if source.uneven:
        check.warnings.append(f"frame rates vary: frames are resampled by time to {source.fps:g} fps")
    _check_columns(check, source)
    _check_conversion(check, source)
    findings = source.findings()
    check.warnings += findings.warnings
    check.clocks = findings.clocks
    single = [episode.name for episode in source.episodes if episode.frames == 1]
    if single:
        check.warnings.append(
            f"episodes of one frame, which have no transitions: {len(single)}, such as {single[0]}"
        )
    by_content = defaultdict(list)
    for episode in source.episodes:
        by_content[episode.content].append(episode.name)
    _add_duplicates(check, [names for names in by_content.values() if len(names) > 1])


def _count(check: DataCheck, source: Source) -> None:
    """Count the readable episodes."""
    frames = [e.frames for e in source.episodes if not {e.label, e.name} & check.unreadable.keys()]
    check.episodes = {
        "count": len(frames),
        "frames": sum(frames),
        "seconds": round(sum(frames) / source.fps, 3),
        "shortest": min(frames, default=0),
        "longest": max(frames, default=0),
    }


def _check_conversion(check: DataCheck, source: Source) -> None:
    """Find the reasons why videos or LeRobot v2 data cannot be converted to version 3."""
    refused = "; precompute --output column rejects"
    if not source.lerobot_version and source.lerobot_parts() is None:
        check.warnings.append(f"{check.kind} cannot become a LeRobot dataset{refused} them")
        return
    if not source.lerobot_version.startswith("v3") and not source.uneven and not is_integer_rate(source.fps):
        check.warnings.append(f"{source.fps:g} frames per second is not an integer{refused} it")
    if not source.whole_videos:
        return
    others = [file.name for file in source.video_files if file.suffix.lower() != ".mp4"]
    if others:
        check.warnings.append(f"videos other than mp4: {len(others)}, such as {others[0]}{refused} them")
    if source.uneven:
        return
    irregular = []
    for file in source.video_files:
        try:
            times = frame_times(file)
        except Unreadable:
            continue  # `_check_camera` reports it
        regular = np.arange(len(times)) / max(1, round(source.fps))
        if (np.abs(times - regular) > LEROBOT_TOLERANCE_S).any():
            irregular.append(file.name)
    if irregular and not others:
        check.warnings.append(
            f"videos with frames that are not at row / fps: {len(irregular)}, such as "
            f"{irregular[0]}{refused} them"
        )


def _check_columns(check: DataCheck, source: Source) -> None:
    """Check numeric columns: state and action, and all columns of LeRobot data."""
    for name in sorted({"observation.state", "action", *source.numeric_columns}):
        column = source.column(name)
        if column is None:
            continue
        wrong = np.flatnonzero(~finite_rows(column))
        check.columns[name] = {"shape": list(column.shape[1:]), "rows": len(column), "nonfinite": len(wrong)}
        if len(wrong):
            check.columns[name]["first"] = int(wrong[0])
            used = name in ("observation.state", "action")
            check.warnings.append(
                f"column {name}: {len(wrong)} of {len(column)} rows are missing, NaN or infinite, the first "
                f"is row {wrong[0]}{'; drop them with --drop-nonfinite' if used else ''}"
            )


def _check_camera(check: DataCheck, path: Path, source: Source) -> None:
    """Check the videos of one camera: codec, color and orientation."""
    check.unreadable |= source.unreadable
    videos: list[VideoProperties] = []
    rotated = []
    for file in source.video_files:
        try:
            videos.append(video_properties(file))
            if videos[-1].orientation != (1, 0, 0, 1):
                rotated.append(file.name)
        except Unreadable as error:
            check.unreadable[file.relative_to(path).as_posix() if path.is_dir() else file.name] = str(error)
    entry: dict[str, Any] = {"key": source.camera, "files": len(source.video_files)}
    for name in ("codec", "pixel_format", "matrix", "streams"):
        entry[name] = sorted({str(getattr(video, name)) or "unspecified" for video in videos})
    if not source.video_files:
        entry["pixel_format"] = list(source.image_modes())
        if deep := [mode for mode in entry["pixel_format"] if mode in SIXTEEN_BITS]:
            check.warnings.append(
                f"camera {source.camera}: of images of 16 bits ({deep[0]}) the upper 8 are used, as of a "
                f"gray16 video; store 8 bits to keep steps below 256"
            )
    sizes = [*source.sizes, *((video.width, video.height) for video in videos)]
    entry["size"] = sorted({f"{width}x{height}" for width, height in sizes})
    entry["rotated_or_mirrored"] = len(rotated)
    check.cameras.append(entry)
    if len(entry["size"]) > 1:
        check.warnings.append(
            f"videos of different sizes: {', '.join(entry['size'])}; precompute --output column and "
            f"resolution 0 reject them"
        )
    several = sum(not video.first for video in videos)
    if several:
        check.warnings.append(
            f"videos of which FFmpeg chooses another stream than the first: {several}; LeRobot's decoders "
            f"show different ones, and precompute --output column rejects them"
        )
    if rotated:
        check.warnings.append(
            f"videos rotated or mirrored by a display matrix: {len(rotated)}, such as {rotated[0]}; they are "
            f"shown upright, and precompute --output column rejects them"
        )


def _add_frames(check: DataCheck, found: FrameFindings) -> None:
    """Add the findings in the frames of one camera."""
    check.decoded_frames += found.frames
    for name, reason in found.unreadable.items():
        check.unreadable.setdefault(name, reason)
    check.still += found.still
    if found.fewer:
        check.warnings.append(
            f"videos that decode to a different number of frames than they contain: {len(found.fewer)}, such "
            f"as {found.fewer[0]}"
        )
    if found.resized:
        check.warnings.append(
            f"episodes whose frames change size: {len(found.resized)}, such as {found.resized[0]}; "
            f"precompute --output column and resolution 0 reject them"
        )
    if found.still:
        first = found.still[0]
        check.warnings.append(
            f"spans of {STILL_S:g} s or more without a change: {len(found.still)}, such as "
            f"{first['episode']} from {first['from_s']:.1f} to {first['to_s']:.1f} s"
        )
    _add_duplicates(check, found.duplicates)


def _add_duplicates(check: DataCheck, groups: list[list[str]]) -> None:
    new = [names for names in groups if names not in check.duplicates]
    if new:
        check.duplicates += new
        check.warnings.append(
            f"groups of episodes with the same frames: {len(new)}, such as {', '.join(new[0][:3])}"
        )
