"""Shards of `latentact shard`, and WebDataset tars of other programs: a folder, a pattern or one tar.

The clips of a scene are one episode. Frames stored as images are read by byte range in any order, so that
only the index is held in memory and no cache is needed (`data.access`).
"""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt8
from PIL import Image

from latentact.data.decode.video import decode
from latentact.data.digest import Memo, blake2b
from latentact.data.files import printable
from latentact.data.format import (
    FORMATS,
    UNTIMED,
    EpisodeMetadata,
    Source,
    Unreadable,
    choose_camera,
    discrete_space,
)
from latentact.data.formats.video_folder import has_videos
from latentact.data.tars import (
    MANIFEST,
    WORK,
    Range,
    ShardClip,
    ShardIndex,
    file_sha256,
    foreign_cameras,
    foreign_clips,
    is_pattern,
    read_shard,
    scan_tar,
    tar_files,
)
from latentact.data.time_base import rates_agree
from latentact.errors import UserError
from latentact.io.arrays import DAMAGED
from latentact.io.atomic import read_object
from latentact.progress import Progress
from latentact.types import ActionSpace

_OPEN_TARS = 256
_COLUMNS = {"action": "action", "observation.state": "state"}


@FORMATS.register("shards")
class Shards:
    """`.tar` files: ours with their json files, and other WebDataset tars."""

    @staticmethod
    def detect(path: Path) -> bool:
        """Return whether `path` is a tar, a pattern for tars, or a folder with tars and without videos."""
        if not path.is_dir():
            return path.suffix == ".tar" and (path.is_file() or is_pattern(path))
        return not (path / "meta/info.json").exists() and not has_videos(path) and bool(tar_files(path))

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> ShardSource:
        """Read the JSON file next to each tar, or else the headers of the tar.

        Raises:
            UserError: a JSON file is from a newer release, or the camera is unknown or must be given.
        """
        return ShardSource(path, camera, memo)


class ShardSource(Source):
    """The clips in tars; each scene is an episode.

    Args:
        path: folder, pattern or tar.
        camera: camera key; empty: the only one.
        memo: cache of hashes, and of the headers of tars without a JSON file.
    """

    kind = "shards"
    resizable = True

    def __init__(self, path: Path, camera: str, memo: Memo) -> None:
        """Build the index."""
        self._path = path
        self._open_tar = functools.lru_cache(maxsize=_OPEN_TARS)(_open_tar)
        self._columns: dict[str, np.ndarray | None] = {}
        self._ranges: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
        self.notes, self.skipped, self.unreadable = [], {}, {}
        self._damaged: dict[str, str] = {}
        """Tars that were truncated or altered, or are missing: name -> reason."""
        files = tar_files(path)
        if not files:
            raise UserError(f"{path} must match existing tar files, got none. Check the pattern.")
        root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
        megabytes = sum(file.stat().st_size for file in files if file.is_file()) >> 20
        with Progress("checking shards", megabytes, "MB") as progress:

            def find(file: Path) -> str:
                found = file_sha256(file)
                progress.advance(file.stat().st_size >> 20)
                return found

            def sha256(file: Path) -> str:
                return memo.get(file, "sha256", find)

            read = {file: self._read_index(file, root, memo, sha256) for file in files}
            digests = [sha256(file) for file, index in read.items() if index]
        self._find_missing(files)
        self.damaged = self._damaged
        self.unreadable |= self._damaged
        self._tars = [file for file in files if read[file]]
        indices = [read[file] for file in self._tars]
        self._names = [printable(file.relative_to(root)) for file in self._tars]
        cameras = {camera for index in indices for camera in self._cameras(index)}
        self.camera = choose_camera(sorted(cameras), camera, path) if cameras - {""} or camera else ""
        old = sum(isinstance(index, ShardIndex) and not index.digest for index in indices)
        if old:
            self.notes.append(
                f"{old} JSON files of an older release have no hash of their own, so changes to them are "
                f"not detected"
            )
        clips = [
            index.clips
            if isinstance(index, ShardIndex)
            else self._compact(file, foreign_clips(index, name, self.camera))
            for index, name, file in zip(indices, self._names, self._tars, strict=True)
        ]
        self._join(clips, digests)
        self._describe_actions([index for index in indices if isinstance(index, ShardIndex)])

    def _read_index(
        self, file: Path, root: Path, memo: Memo, sha256: Callable[[Path], str]
    ) -> ShardIndex | dict[str, Any]:
        """Return the JSON file next to a tar, or else the samples in it; empty for a damaged tar."""
        name = printable(file.relative_to(root))
        try:
            if not file.is_file():
                raise Unreadable("it does not exist")
            if shard := read_shard(file, functools.partial(sha256, file)):
                return shard.model_copy(update={"clips": self._compact(file, shard.clips)})
            scan: dict[str, Any] = memo.get(file, "tar.1", scan_tar)
            if "error" in scan:
                raise Unreadable(scan["error"])
        except Unreadable as error:
            self._damaged[name] = str(error)
            return {}
        broken = {s["key"]: s["error"] for s in scan["samples"] if "error" in s}
        self.unreadable |= {f"{name}/{key}": why for key, why in broken.items()}
        self.skipped |= {f"{name} *.{ending}": f"{n} members" for ending, n in scan["skipped"].items()}
        return scan

    def _compact(self, file: Path, clips: Sequence[ShardClip]) -> tuple[ShardClip, ...]:
        """Move the byte ranges of a tar's clips into arrays, which need a sixth of the memory."""
        none = [0] * max((clip.count for clip in clips if clip.video), default=0)
        ranges = [(clip.offsets or none[: clip.count], clip.sizes or none[: clip.count]) for clip in clips]
        self._ranges[file] = (
            np.fromiter(itertools.chain(*(offsets for offsets, _ in ranges)), np.int64),
            np.fromiter(itertools.chain(*(sizes for _, sizes in ranges)), np.int32),
        )
        return tuple(clip.model_copy(update={"offsets": (), "sizes": ()}) for clip in clips)

    @staticmethod
    def _cameras(index: ShardIndex | dict[str, Any]) -> set[str]:
        return {index.camera} if isinstance(index, ShardIndex) else foreign_cameras(index)

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (seconds since the first frame, frame) of a scene."""
        tar, clips = self._episodes[number]
        index = 0
        for clip in clips:
            times = clip.seconds() - clips[0].start_s
            if clip.video is None:
                for seconds in times.tolist():
                    yield seconds, self.frame(number, index)
                    index += 1
                continue
            video, named = decode(self._read(tar, *clip.video)), bool(clip.width)
            shown = 0
            for place, (seconds, frame) in enumerate(video):
                if place < clip.count:
                    yield float(times[place] if named else times[0] + seconds), frame
                    shown += 1
            if shown < clip.count:
                raise Unreadable(f"clip {clip.key} has {shown} of its {clip.count} frames")
            index += clip.count

    def times(self, number: int) -> Float64[np.ndarray, " n"]:
        """Return the time of each frame of an episode, in seconds since its first frame."""
        clips = self._episodes[number][1]
        return np.concatenate([clip.seconds() for clip in clips]) - clips[0].start_s

    def frame(self, number: int, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return frame `index` of an episode; requires `random_access`.

        Raises:
            Unreadable: the frame is truncated or not an image.
        """
        row = self.first_rows[number] + index
        data = self._read(self._episodes[number][0], int(self._offsets[row]), int(self._sizes[row]))
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Unreadable(f"the image of frame {index} cannot be decoded ({error})") from error

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return `action` or `observation.state` of all frames; None for tars without them."""
        if name not in _COLUMNS or not self.episodes:
            return None
        if name not in self._columns:
            places = [
                (tar, clip, getattr(clip, _COLUMNS[name])) for tar, clips in self._episodes for clip in clips
            ]
            some = any(place for *_, place in places)
            if some and not all(place for *_, place in places):
                self.notes.append(f"column {name} is missing from some clips and is left out")
                some = False
            rows = [self._rows(*each, name) for each in places] if some else []
            if len(shapes := {each.shape[1:] for each in rows}) > 1:
                raise UserError(
                    f"{self._path}: rows of {name} must have one shape, got {sorted(shapes)}. Read the "
                    f"tars as separate datasets."
                )
            self._columns[name] = np.concatenate(rows) if rows else None
        return self._columns[name]

    def row_tasks(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return the index into `tasks` of each frame of an episode; -1: no task."""
        clips = self._episodes[number][1]
        return np.repeat([self._task[clip.text] for clip in clips], [clip.count for clip in clips])

    def _find_missing(self, files: list[Path]) -> None:
        """Report unfinished folders, and shards that the manifest lists and the folder lacks."""
        path = self._path
        if path.is_dir() and (path / WORK).is_dir():
            self.notes.append("the folder is unfinished: re-run latentact shard to complete it")
        if not path.is_dir() or not (path / MANIFEST).is_file():
            return
        names = {file.name for file in files}
        count = read_object(path / MANIFEST).get("shards")
        for index in range(count if isinstance(count, int) else 0):
            if (name := f"shard-{index:06d}.tar") not in names:
                self._damaged[name] = f"it is missing, although {MANIFEST} lists it"

    def _join(self, clips: list[tuple[ShardClip, ...]], digests: list[str]) -> None:
        """Join the clips of each scene into an episode."""
        self._episodes: list[tuple[int, list[ShardClip]]] = []
        groups: list[tuple[int, int]] = []
        self.episodes = []
        sizes: list[tuple[int, int]] = []
        for tar, found in enumerate(clips):
            begin = len(self._episodes)
            for clip in found:
                if len(self._episodes) > begin and clip.continues(self._episodes[-1][1][-1]):
                    self._episodes[-1][1].append(clip)
                else:
                    self._episodes.append((tar, [clip]))
            groups.append((begin, len(self._episodes)))
        self.groups = groups
        counts: Counter[str] = Counter()
        for tar, scene in self._episodes:
            first = scene[0]
            name = f"{first.source} #{first.scene}"
            counts[name] += 1
            texts = dict.fromkeys(clip.text for clip in scene if clip.text)
            self.episodes.append(
                EpisodeMetadata(
                    name=name if counts[name] == 1 else f"{name} ({counts[name]})",
                    file=self._names[tar],
                    task=" / ".join(texts),
                    frames=sum(clip.count for clip in scene),
                    content=blake2b(digests[tar].encode(), first.key.encode(), first.source.encode()),
                )
            )
            sizes.append((first.width, first.height))
        self._stated = self._episodes
        """Episodes with the rates of their clips, 0 where a clip has none."""
        self._set_rates()
        if self.untimed:
            self.notes.append(UNTIMED.format(self.fps))
        ranges = [self._ranges.pop(file) for file in self._tars]
        self._offsets = np.concatenate([np.zeros(0, np.int64), *(offsets for offsets, _ in ranges)])
        """Offset of each frame's image in its tar; 0 for frames of a video."""
        self._sizes = np.concatenate([np.zeros(0, np.int32), *(sizes for _, sizes in ranges)])
        self.random_access = bool(self.episodes) and bool((self._sizes > 0).all())
        lengths = [episode.frames for episode in self.episodes]
        self.first_rows = (np.cumsum(lengths) - lengths).tolist() if lengths else []
        self.tasks = list(dict.fromkeys(c.text for _, scene in self._episodes for c in scene if c.text))
        self._task = {text: place for place, text in enumerate(self.tasks)} | {"": -1}
        self.sizes = sorted({size for size in sizes if all(size)})

    def _set_rates(self, fps: float = 0.0) -> None:
        """Set the frame rate; clips without one get the given one, or else the slowest."""
        rates = {clip.fps for _, scene in self._stated for clip in scene}
        known = [rate for rate in rates if rate] + [fps] * bool(fps)
        self.untimed = 0.0 in rates
        self.uneven = len(known) > 1 and not rates_agree(max(known), min(known))
        self.fps = min(known, default=1.0)
        if self.untimed:
            own = fps or self.fps
            self._episodes = [
                (tar, [clip if clip.fps else clip.at_rate(own) for clip in scene])
                for tar, scene in self._stated
            ]

    def set_fps(self, fps: float) -> None:
        """Set the frame rate of clips without one."""
        self.notes.remove(UNTIMED.format(self.fps))
        self._set_rates(fps)

    def _describe_actions(self, shards: list[ShardIndex]) -> None:
        """Set the action space: that of the JSON files, or else that of the values."""
        self.action_space, self.action_names = None, ()
        spaces = [(shard.action_space, shard.action_names) for shard in shards]
        if any(space != spaces[0] for space in spaces):
            raise UserError(
                f"{self._path} must have one action space in all tars, got several. Read them as separate "
                "datasets."
            )
        if spaces:
            space, self.action_names = spaces[0]
            self.action_space = ActionSpace(**space.model_dump()) if space else None
        elif (values := self.column("action")) is not None:
            if values.dtype.kind == "f":
                self.action_space = ActionSpace(kind="continuous", size=int(np.prod(values.shape[1:])) or 1)
                return
            try:
                self.action_space = discrete_space(values.reshape(-1))
            except ValueError as error:
                raise UserError(f"{self._path}, `action`: {error}; store numbers as float32.") from error

    def _rows(self, tar: int, clip: ShardClip, place: Range, name: str) -> np.ndarray:
        where = f"{self._tars[tar]}: {_COLUMNS[name]} of clip {clip.key}"
        try:
            rows = np.load(io.BytesIO(self._read(tar, *place)), allow_pickle=False)
        except DAMAGED as error:
            raise UserError(f"{where} is not a plain array ({error}); make the tar again.") from error
        rows = rows[None] if clip.single and rows.ndim < 2 else rows
        if rows.dtype.kind not in "biuf" or rows.ndim == 0 or len(rows) != clip.count:
            raise UserError(
                f"{where} must have a row of numbers for each of {clip.count} frames, got {rows.dtype} "
                f"{list(rows.shape)}; make the tar again."
            )
        return rows

    def _read(self, tar: int, offset: int, size: int) -> bytes:
        file = self._open_tar(self._tars[tar])  # held while it is read, as the cache may drop it
        data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise Unreadable(f"it is truncated: bytes {offset} to {offset + size} are missing")
        return data


def _open_tar(file: Path) -> BinaryIO:
    return file.open("rb", buffering=0)  # type: ignore[return-value]
