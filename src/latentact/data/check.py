"""Checks of a dataset before it is used: `latentact check-data`.

Tables and video packets are read, and up to a given number of frames are decoded at a small size. Whatever a
reader rejects, skips or repairs is reported here first, by the same functions.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from latentact.data.cache import cache_folder, finite_rows
from latentact.data.decode.color import SIXTEEN_BITS
from latentact.data.decode.pipeline import DecodeSpec, decoded
from latentact.data.decode.resize import resize
from latentact.data.decode.video import VideoProperties, frame_times, video_properties
from latentact.data.digest import Memo
from latentact.data.format import Source, Unreadable, open_source
from latentact.data.formats.npz import NpzSource
from latentact.data.formats.shards import ShardSource
from latentact.data.formats.video_folder import VideoFolderSource
from latentact.data.lerobot.metadata import cameras, read_info
from latentact.data.lerobot.openable import problems, total_problems
from latentact.data.lerobot.source import LeRobotSource, lerobot_version
from latentact.data.time_base import LEROBOT_TOLERANCE_S, clock_problem, is_integer_rate
from latentact.errors import UserError
from latentact.io.records import parse_json, read_text
from latentact.progress import Progress

SIZE = 96
"""Height and width in pixels at which frames are compared."""
STILL_S = 1.0
"""Seconds without a change that count as a still span."""
_STILL_LEVELS = 0.5
_SHOWN = 8


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


@dataclass(kw_only=True)
class Sheet:
    """Frames of an episode for the contact sheet."""

    camera: str
    episode: str
    frames: list[UInt8[np.ndarray, "_ _ c"]]
    """First, middle and last frame, at their original size."""


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
    check, sheets = DataCheck(path=str(path)), []
    try:
        keys = [camera] if camera else _camera_keys(path)
        for key in keys or [""]:
            memo = Memo(cache_folder() / "memo", path)
            source = open_source(path, key, memo)
            first = key == (keys or [""])[0]
            if first:
                _describe(check, path, source, no_strict)
            _check_camera(check, path, source)
            sheets += _check_frames(check, path, key, source, max_frames)
            if first:
                _count(check, source)
        if check.unreadable:
            name, reason = next(iter(check.unreadable.items()))
            check.warnings.append(
                f"unreadable files and episodes, which are left out: {len(check.unreadable)}, such as "
                f"{name} ({reason}){_consequence(check)}"
            )
        if not check.episodes.get("count"):
            reasons = [*check.unreadable.values(), *check.skipped.values(), "it has no episodes"]
            check.errors.append(f"{path} holds no readable episodes ({reasons[0]}).")
    except UserError as error:
        check.errors.append(str(error))
    return check, sheets


def _consequence(check: DataCheck) -> str:
    """Return the consequence of unreadable episodes for `precompute --output column`."""
    if check.kind.startswith("LeRobot v3"):
        return "; precompute --output column keeps their rows and rejects those that LeRobot cannot read"
    if check.kind.startswith("LeRobot") and len(check.cameras) > 1:
        return "; precompute --output column rejects an episode of which another camera is unreadable"
    return ""


def _camera_keys(path: Path) -> list[str]:
    """Return the cameras of a LeRobot dataset; empty for other data."""
    if not path.exists() or not lerobot_version(path):
        return []
    return cameras(read_info(path).features)


def _describe(check: DataCheck, path: Path, source: Source, no_strict: bool) -> None:
    """Fill in the findings that do not depend on the camera."""
    kinds = {
        VideoFolderSource: "video" if path.is_file() else "folder of videos",
        NpzSource: "npz episodes",
        ShardSource: "shards",
    }
    version = lerobot_version(path) if path.is_dir() else ""
    check.kind = f"LeRobot {version}" if version else kinds.get(type(source), "dataset")
    check.rate = {"fps": source.fps, "varies": source.uneven}
    check.tasks = list(source.tasks)
    check.actions = "" if source.action_space is None else str(source.action_space)
    check.skipped = dict(source.skipped)
    damaged = {} if no_strict else getattr(source, "damaged", {})
    if damaged:
        name, reason = next(iter(damaged.items()))
        check.errors.append(
            f"{name} is damaged ({reason}); copy it again, or leave it out with --no-strict "
            f"(data.no_strict=true)."
        )
    check.warnings += source.notes
    if source.uneven:
        check.warnings.append(f"frame rates vary: frames are resampled by time to {source.fps:g} fps")
    _check_columns(check, source)
    _check_conversion(check, source, version)
    if isinstance(source, LeRobotSource):
        if source.absent and version.startswith("v3"):
            check.warnings.append(
                "LeRobot cannot open part of a v3 dataset: precompute --output column rejects it"
            )
        if version.startswith("v3") and (lacking := _without_statistics(path, source)):
            check.warnings.append(
                f"meta/stats.json has no statistics of {', '.join(lacking)}, which LeRobot needs to train a "
                f"policy"
            )
        found = [] if version.startswith("v3") else [*total_problems(source)]
        found += [f"{text}; precompute --output column rejects it" for text in problems(path, source)]
        check.warnings += found
        _check_clocks(check, source)
    single = [episode.name for episode in source.episodes if episode.frames == 1]
    if single:
        check.warnings.append(
            f"episodes of one frame, which have no transitions: {len(single)}, such as {single[0]}"
        )
    alike = defaultdict(list)
    for episode in source.episodes:
        alike[episode.content].append(episode.name)
    _add_duplicates(check, [names for names in alike.values() if len(names) > 1])


def _without_statistics(path: Path, source: LeRobotSource) -> list[str]:
    """Return the cameras, state and action without statistics in `meta/stats.json`."""
    file = path / "meta/stats.json"
    try:
        known = parse_json(read_text(file), str(file)) if file.is_file() else {}
    except UserError:
        return []  # `problems` reports it
    needed = [key for key, feature in source.info.features.items() if feature.visual and not feature.depth]
    needed += [name for name in ("observation.state", "action") if name in source.tables.features]
    return [name for name in needed if isinstance(known, dict) and name not in known]


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


def _check_conversion(check: DataCheck, source: Source, version: str) -> None:
    """Find the reasons why videos or LeRobot v2 data cannot be converted to version 3."""
    refused = "; precompute --output column rejects"
    if not isinstance(source, (LeRobotSource, VideoFolderSource)):
        check.warnings.append(f"{check.kind} cannot become a LeRobot dataset{refused} them")
        return
    if not version.startswith("v3") and not source.uneven and not is_integer_rate(source.fps):
        check.warnings.append(f"{source.fps:g} frames per second is not an integer{refused} it")
    if not isinstance(source, VideoFolderSource):
        return
    others = [file.name for file in source.files if file.suffix.lower() != ".mp4"]
    if others:
        check.warnings.append(f"videos other than mp4: {len(others)}, such as {others[0]}{refused} them")
    if source.uneven:
        return
    irregular = []
    for file in source.files:
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
    names = {"observation.state", "action"}
    if isinstance(source, LeRobotSource):
        names |= {name for name, feature in source.tables.features.items() if feature.numeric}
    for name in sorted(names):
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


def _check_clocks(check: DataCheck, source: LeRobotSource) -> None:
    found: Counter[str] = Counter()
    worst, holes = 0.0, 0
    for recording in source.recordings:
        kind, size = _clock(source.tables.timestamps(recording.episode), source.fps)
        found[kind] += 1
        worst = max(worst, size if kind == "jitter" else 0.0)
        holes += int(size) if kind == "gaps" else 0
    found["impossible"] += source.wrong_clocks
    check.clocks = {kind: number for kind, number in found.items() if number}
    if found["gaps"]:
        check.warnings.append(
            f"episodes with gaps in their timestamps: {found['gaps']} ({holes} gaps); no transition crosses "
            f"one"
        )
    if found["jitter"]:
        check.warnings.append(
            f"episodes with timestamps that are not row / fps: {found['jitter']} (up to {1000 * worst:.3g} "
            f"ms off); LeRobot reads them with a larger tolerance_s only"
        )


def _clock(timestamps: Float64[np.ndarray, " n"], fps: float) -> tuple[str, float]:
    """Return the kind of a `timestamp` column, and its number of gaps or its largest error in seconds."""
    if clock_problem(timestamps):
        return "impossible", 0.0
    off = np.abs(timestamps - timestamps[0] - np.arange(len(timestamps)) / fps)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(timestamps)
    if (off <= LEROBOT_TOLERANCE_S + rounding).all():
        return ("regular" if abs(timestamps[0]) <= LEROBOT_TOLERANCE_S else "offset"), 0.0
    steps = np.diff(timestamps) * fps
    holes = int((steps.round() > 1).sum())
    if holes and (np.abs(steps - steps.round()) < 0.1).all():
        return "gaps", float(holes)
    return "jitter", float(off.max())


def _check_camera(check: DataCheck, path: Path, source: Source) -> None:
    """Check the videos of one camera: codec, color and orientation."""
    check.unreadable |= source.unreadable
    files: Sequence[Path] = []
    if isinstance(source, VideoFolderSource):
        files = source.files
    elif isinstance(source, LeRobotSource):
        files = [*dict.fromkeys(source.video_file(n) for n, r in enumerate(source.recordings) if r.video)]
    looks: list[VideoProperties] = []
    turned = []
    for file in files:
        try:
            looks.append(video_properties(file))
            if looks[-1].orientation != (1, 0, 0, 1):
                turned.append(file.name)
        except Unreadable as error:
            check.unreadable[file.relative_to(path).as_posix() if path.is_dir() else file.name] = str(error)
    entry: dict[str, Any] = {"key": source.camera, "files": len(files)}
    for name in ("codec", "pixel_format", "matrix", "streams"):
        entry[name] = sorted({str(getattr(seen, name)) or "unspecified" for seen in looks})
    if isinstance(source, LeRobotSource) and not files:
        entry["pixel_format"] = _image_modes(source)
        if deep := [mode for mode in entry["pixel_format"] if mode in SIXTEEN_BITS]:
            check.warnings.append(
                f"camera {source.camera}: of images of 16 bits ({deep[0]}) the upper 8 are used, as of a "
                f"gray16 video; store 8 bits to keep steps below 256"
            )
    sizes = source.sizes if isinstance(source, ShardSource) else [(seen.width, seen.height) for seen in looks]
    entry["size"] = sorted({f"{width}x{height}" for width, height in sizes})
    entry["rotated_or_mirrored"] = len(turned)
    check.cameras.append(entry)
    if len(entry["size"]) > 1:
        check.warnings.append(
            f"videos of different sizes: {', '.join(entry['size'])}; precompute --output column and "
            f"resolution 0 reject them"
        )
    several = sum(not seen.first for seen in looks)
    if several:
        check.warnings.append(
            f"videos of which FFmpeg chooses another stream than the first: {several}; LeRobot's decoders "
            f"show different ones, and precompute --output column rejects them"
        )
    if turned:
        check.warnings.append(
            f"videos rotated or mirrored by a display matrix: {len(turned)}, such as {turned[0]}; they are "
            f"shown upright, and precompute --output column rejects them"
        )


def _image_modes(source: LeRobotSource) -> list[str]:
    """Return Pillow's modes of the first images of some episodes."""
    modes = set()
    for recording in source.recordings[:: max(1, len(source.recordings) // _SHOWN)]:
        with suppress(Unreadable):  # decoding reports it
            modes.add(source.tables.image_mode(source.camera, recording.episode))
    return sorted(modes)


def _check_frames(check: DataCheck, path: Path, camera: str, source: Source, max_frames: int) -> list[Sheet]:
    """Decode frames at a small size; find still spans, duplicate episodes, size changes and damage."""
    if not source.episodes or not max_frames:
        return []
    order = np.argsort(np.arange(len(source.episodes)) * 0.618034 % 1)  # spread over the data
    ends = np.cumsum([source.episodes[n].frames for n in order])
    chosen = sorted(int(n) for n in order[: max(1, int((ends <= max_frames).sum()))])
    spec = DecodeSpec(source=source, fps=0.0, resolution=0, resize="uint8", strict=False)
    sheets: list[Sheet] = []
    alike: dict[str, list[str]] = defaultdict(list)
    still: list[dict[str, Any]] = []
    resized: list[str] = []
    fewer: list[str] = []
    total = sum(source.episodes[n].frames for n in chosen)
    with (
        Progress(f"checking {camera or 'frames'}", total, "frames") as progress,
        closing(decoded(spec, chosen)) as episodes,
    ):
        for number, chunks in episodes:
            episode, seen = (
                source.episodes[number],
                _EpisodeStatistics(source.episodes[number].frames, source.resizable),
            )
            try:
                for chunk in chunks:
                    seen.add(chunk.frames, chunk.times)
                    progress.advance(len(chunk.frames))
            except Unreadable as error:
                check.unreadable.setdefault(episode.label, str(error))
                continue
            check.decoded_frames += seen.frames
            if seen.frames != episode.frames:
                fewer.append(f"{episode.name} ({seen.frames} of {episode.frames})")
            alike[seen.digest].append(episode.name)
            if len(seen.sizes) > 1:
                sizes = ", ".join(f"{width}x{height}" for height, width in seen.sizes)
                resized.append(f"{episode.name} ({sizes})")
            for begin, end in still_spans(np.array(seen.changes), np.array(seen.times)):
                still.append({"camera": camera, "episode": episode.name, "from_s": begin, "to_s": end})
            if len(sheets) < _SHOWN:
                sheets.append(Sheet(camera=camera, episode=episode.name, frames=seen.kept))
    if fewer:
        check.warnings.append(
            f"videos that decode to a different number of frames than they contain: {len(fewer)}, such as "
            f"{fewer[0]}"
        )
    if resized:
        check.warnings.append(
            f"episodes whose frames change size: {len(resized)}, such as {resized[0]}; precompute --output "
            f"column and resolution 0 reject them"
        )
    if still:
        check.still += still
        check.warnings.append(
            f"spans of {STILL_S:g} s or more without a change: {len(still)}, such as {still[0]['episode']} "
            f"from {still[0]['from_s']:.1f} to {still[0]['to_s']:.1f} s"
        )
    _add_duplicates(check, [names for names in alike.values() if len(names) > 1])
    return sheets


class _EpisodeStatistics:
    """Statistics of an episode's frames, updated chunk by chunk."""

    def __init__(self, expected: int, resizable: bool) -> None:
        self._size = SIZE if resizable else 0
        self.frames = 0
        self.times: list[float] = []
        self.changes: list[float] = []
        self.kept: list[np.ndarray] = []
        self.sizes: dict[tuple[int, ...], None] = {}
        self._places = {0, expected // 2, max(expected - 1, 0)}
        self._hash = hashlib.blake2b(digest_size=16)
        self._last: np.ndarray | None = None

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, frames: UInt8[np.ndarray, "n h w c"], times: list[float]) -> None:
        self.kept += [frame for n, frame in enumerate(frames, self.frames) if n in self._places]
        self.sizes[frames.shape[1:3]] = None
        small = resize(frames, self._size)
        self._hash.update(np.ascontiguousarray(small))
        whole = small if self._last is None else np.concatenate([self._last[None], small])
        self.changes += np.abs(np.diff(whole.astype(np.int16), axis=0)).mean((1, 2, 3)).tolist()
        self._last, self.times, self.frames = small[-1], self.times + times, self.frames + len(frames)


def still_spans(
    changes: Float64[np.ndarray, " m"], times: Float64[np.ndarray, " n"]
) -> list[tuple[float, float]]:
    """Return (start, end) in seconds of every span of at least `STILL_S` seconds in which nothing changes.

    Args:
        changes: mean difference between neighboring frames in gray levels, one fewer than frames.
        times: times of the frames in seconds.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (changes < _STILL_LEVELS).astype(int), [0]])))
    spans = [(float(times[begin]), float(times[end])) for begin, end in edges.reshape(-1, 2)]
    return [(begin, end) for begin, end in spans if end - begin >= STILL_S]


def _add_duplicates(check: DataCheck, groups: list[list[str]]) -> None:
    new = [names for names in groups if names not in check.duplicates]
    if new:
        check.duplicates += new
        check.warnings.append(
            f"groups of episodes with the same frames: {len(new)}, such as {', '.join(new[0][:3])}"
        )
