"""Shards: WebDataset tar files with clips of video, and a JSON file with byte ranges next to each.

`shard-000123.tar` holds clips. The members of a clip share the name up to the first dot: `KEY.json` (source,
text, times), `KEY.0000.jpg`, `KEY.0001.jpg`, ... or `KEY.mp4`, and `KEY.action.npy`, `KEY.state.npy` if the
data has them. `shard-000123.json` is written last: a shard without it is unfinished. Tars of other
programs have no such file; their headers are read once. Nothing in a tar is unpickled or executed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from latentact.data.decode.video import SUFFIXES, probe
from latentact.data.files import files_below
from latentact.data.format import Unreadable
from latentact.errors import UserError
from latentact.io.atomic import atomic_write
from latentact.io.records import Record, parse_json, parse_record, read_text

FORMAT, VERSION = "latentact shard", 1
MANIFEST = "manifest.json"
WORK = ".work"
"""Folder of an unfinished `latentact shard`."""
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
_BLOCK = 512
_CHUNK = 1 << 20
_MOST_PATHS = 10**6
_MOST_JSON = 1 << 20
_TEXTS = ("text", "caption", "task", "instruction", "language_instruction")
_EPISODES = ("episode", "episode_index", "episode_id", "video", "video_id")
_RATES = ("fps", "frame_rate")

Range = tuple[int, int]
"""Offset and size of a member in its tar, in bytes."""


class ShardClip(Record):
    """Consecutive frames of one scene, in one tar."""

    key: str
    """Name of its members, up to the first dot."""
    source: str
    """Name of the video or episode."""
    episode: int = 0
    """Index of the episode in its source data."""
    scene: int = 0
    """Index of the scene in the episode."""
    first: int = 0
    """Index of its first frame in the scene."""
    start_s: float = 0.0
    """Time of the first frame in the episode, seconds."""
    fps: float = 0.0
    """Frames per second; 0: unknown."""
    text: str = ""
    """Task text."""
    times: tuple[float, ...] | None = Field(default=None, strict=False)
    """Seconds since the clip's first frame; None: frame / fps."""
    count: int
    """Number of frames."""
    width: int = 0
    height: int = 0
    offsets: tuple[int, ...] = Field(default=(), strict=False)
    """Offset of each frame's image in the tar; empty: the frames are in a video."""
    sizes: tuple[int, ...] = Field(default=(), strict=False)
    """Bytes of each frame's image."""
    video: Range | None = Field(default=None, strict=False)
    action: Range | None = Field(default=None, strict=False)
    state: Range | None = Field(default=None, strict=False)
    single: bool = False
    """Whether it is a sample with one image, whose arrays have no frame axis."""

    @model_validator(mode="after")
    def _check(self) -> ShardClip:
        images = 0 if self.video else self.count
        if self.count < 1 or not len(self.offsets) == len(self.sizes) == images:
            raise ValueError(f"an image for each of {self.count} frames, or a video")
        if self.times is not None and len(self.times) != self.count:
            raise ValueError(f"a time for each of {self.count} frames")
        if min(self.offsets, default=0) < 0 or not all(0 < size < 2**31 for size in self.sizes):
            raise ValueError("ranges of bytes")
        return self

    def continues(self, other: ShardClip) -> bool:
        """Return whether this clip follows `other` in the same scene."""
        place = other.source, other.episode, other.scene, other.first + other.count
        return (self.source, self.episode, self.scene, self.first) == place

    def at_rate(self, fps: float) -> ShardClip:
        """Return a clip of unknown rate, whose times count frames, at a rate."""
        return self.model_copy(update={"fps": fps, "start_s": self.start_s / fps})

    def seconds(self) -> np.ndarray:
        """Return the time of each frame in the episode, seconds."""
        within = np.arange(self.count) / (self.fps or 1.0) if self.times is None else np.array(self.times)
        return self.start_s + within


class ShardEpisode(Record):
    """How one episode of the source data was sharded."""

    number: int
    name: str
    frames: int = 0
    """Number of frames after resampling."""
    cuts: tuple[int, ...] = Field(default=(), strict=False)
    """Frames that start a scene, except the first, before resampling."""
    still: int = 0
    """Number of dropped frames of still spans."""
    short: int = 0
    """Number of dropped frames of scenes that are too short."""
    duplicate: int = 0
    """Number of frames dropped because an earlier episode has the same."""
    digest: str = ""
    """Digest of its frames, if duplicates are dropped."""
    unreadable: str = ""
    """Reason why it cannot be read; empty if it can."""


class Space(Record):
    """Robot action space."""

    kind: str
    size: int
    values: tuple[int, ...] = Field(default=(), strict=False)


class ShardIndex(Record):
    """The JSON file next to a tar."""

    format: str
    version: int
    bytes: int
    """Size of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar."""
    digest: str = ""
    """SHA-256 of all other values of the JSON file; empty in files of older releases."""
    camera: str = ""
    action_space: Space | None = None
    action_names: tuple[str, ...] = Field(default=(), strict=False)
    first: Range = Field(strict=False)
    """Episode and clip at its start."""
    next: Range = Field(strict=False)
    """Episode and clip at the start of the next shard."""
    episodes: tuple[ShardEpisode, ...] = Field(strict=False)
    """Episodes that end in this shard."""
    clips: tuple[ShardClip, ...] = Field(strict=False)


def is_pattern(path: Path) -> bool:
    """Return whether a path that does not exist is a pattern for tars: `DIR/shard-{000000..000003}.tar`."""
    return any(character in str(path) for character in "{*?") and not path.exists()


def tar_files(path: Path) -> list[Path]:
    """Return the tars of a folder or of a pattern with braces, `*` and `?`, or a single tar."""
    if path.is_dir():
        return [file for file in files_below(path, (".tar",))[0] if WORK not in file.parts]
    if not is_pattern(path):
        return [path]
    expanded = [Path(name) for name in itertools.islice(_expand(str(path)), _MOST_PATHS)]
    found = [
        sorted(_anchor(name).glob(str(name.relative_to(_anchor(name)))))
        if set("*?") & {*str(name)}
        else [name]
        for name in expanded
    ]
    return [file for files in found for file in files]


def _anchor(path: Path) -> Path:
    return Path(path.anchor) if path.anchor else Path()


def _expand(text: str) -> Iterator[str]:
    """Yield the names of a brace pattern, as a shell expands it."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        yield text
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        width = len(span[1])
        choices: Iterator[str] | list[str] = (f"{n:0{width}}" for n in range(int(span[1]), int(span[2]) + 1))
    else:
        choices = found[1].split(",")
    for choice in choices:
        yield from _expand(text[: found.start()] + choice + text[found.end() :])


def tar_member(name: str, data: bytes) -> bytes:
    """Return a member as stored in a tar: the header, with no time and no owner, and the padded data."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)


def write_record(file: Path, record: Record) -> None:
    """Write a record as one line of JSON, atomically."""
    with atomic_write(file) as partial:
        partial.write_text(record.model_dump_json() + "\n")


def sealed(shard: ShardIndex) -> ShardIndex:
    """Return a shard with the hash of its JSON file."""
    return shard.model_copy(update={"digest": _digest(shard.model_dump(mode="json"))})


def _digest(values: dict[str, Any]) -> str:
    content = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


TAR_END = bytes(2 * _BLOCK)
"""End-of-archive marker of a tar."""


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def scan_tar(file: Path) -> dict[str, Any]:
    """Return the samples of another program's tar as JSON values, or {"error": reason why it is unreadable}.

    Returns:
        samples: in order, each with its key, `images` [[field, offset, size]], and if present `video`,
            `action` and `state` [offset, size], `count` and `fps` of a video or the `error` of reading it,
            `meta` (an object) and `text`; skipped: number of skipped members by suffix.
    """
    samples: list[dict[str, Any]] = []
    skipped: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                matched = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", member.name)
                if not member.isreg() or matched is None or matched[1].startswith("__"):
                    continue
                key, field = matched[1], matched[2].lower()
                if not samples or samples[-1]["key"] != key:
                    samples.append({"key": key, "images": []})
                if not _add(samples[-1], field, member, tar):
                    ending = field.rpartition(".")[2]
                    skipped[ending] = skipped.get(ending, 0) + 1
            if file.stat().st_size < tar.offset + _BLOCK:
                return {"error": "it is truncated: the end of the archive is missing"}
    except tarfile.ReadError as error:
        compressed = file.suffix != ".tar" or _compressed(file)
        return {
            "error": "it is compressed; unpack it" if compressed else f"it is not a complete tar ({error})"
        }
    except (OSError, tarfile.TarError, ValueError) as error:
        return {"error": f"it is not a complete tar ({error})"}
    return {
        "samples": [sample for sample in samples if len(sample) > 2 or sample["images"]],
        "skipped": skipped,
    }


def _add(sample: dict[str, Any], field: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> bool:
    """Add a member to its sample; return whether it is used."""
    stem, _, ending = field.rpartition(".")
    place = [member.offset_data, member.size]
    if ending in IMAGES:
        sample["images"].append([stem, *place])
    elif f".{ending}" in SUFFIXES:
        try:
            info = probe(_content(tar, member))
            sample |= {"video": place, "count": info.frames, "fps": info.fps}
        except Unreadable as error:
            sample["error"] = str(error)
    elif ending in ("json", "txt", "text") and member.size <= _MOST_JSON:
        text = _content(tar, member).decode("utf-8", "replace").strip()
        if ending != "json":
            sample["text"] = text
        else:
            meta = json.loads(text)
            sample["meta"] = meta if isinstance(meta, dict) else {}
    elif field in ("action.npy", "actions.npy", "state.npy", "states.npy"):
        sample[stem.removesuffix("s")] = place
    else:
        return False
    return True


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = tar.extractfile(member)
    assert opened is not None
    return opened.read()


def _compressed(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")


def foreign_clips(scan: dict[str, Any], tar: str, camera: str) -> list[ShardClip]:
    """Return the clips of another program's tar, or of one of ours without its JSON file.

    Images of a sample whose names have numbers are its frames, in the order of these numbers. Otherwise each
    is the frame of a camera, and following samples are the frames of an episode as long as their metadata has
    the same episode, or else as long as their keys differ only in an increasing number at the end.

    Args:
        scan: result of `scan_tar`.
        tar: name of the tar.
        camera: one of `foreign_cameras`.
    """
    clips: list[ShardClip] = []
    last: tuple[Any, int] | None = None
    for place, sample in enumerate(scan["samples"]):
        meta = sample.get("meta", {})
        about: dict[str, Any] = {
            "key": sample["key"],
            "source": str(meta.get("source", f"{tar}/{sample['key']}")),
            "fps": _number(meta, _RATES) or float(sample.get("fps", 0.0)),
            "text": sample.get("text") or next((meta[n] for n in _TEXTS if isinstance(meta.get(n), str)), ""),
            "action": sample.get("action"),
            "state": sample.get("state"),
            "episode": place,
        }
        ours = {"episode", "scene", "first", "start_s", "times"} <= meta.keys()
        if ours:
            about |= {n: meta[n] for n in ("episode", "scene", "first", "start_s", "times")}

        def clip(*, about: dict[str, Any] = about, **frames: Any) -> ShardClip:
            return parse_record(ShardClip, about | frames, f"{tar}, {about['key']}")

        numbered = [image for image in sample["images"] if re.search(r"\d", image[0])]
        if "video" in sample:
            last = None
            clips.append(clip(video=sample["video"], count=sample["count"]))
        elif numbered:
            last = None
            numbered.sort(key=lambda image: [int(n) for n in re.findall(r"\d+", image[0])])
            clips.append(clip(**_ranges(numbered)))
        elif chosen := [image for image in sample["images"] if image[0] == camera]:
            group, number = _group(sample["key"], meta, place)
            joined = last is not None and last[0] == group and last[1] < number
            last = group, number
            if joined:
                before = clips[-1]
                about |= {"episode": before.episode, "source": before.source, "first": before.first + 1}
                about |= {"start_s": (before.first + 1) / (about["fps"] or 1.0)}
            clips.append(clip(**_ranges(chosen[:1]), single=True))
    return clips


def foreign_cameras(scan: dict[str, Any]) -> set[str]:
    """Return the names of images without a number; a sample has one image per camera."""
    return {
        image[0] for sample in scan["samples"] for image in sample["images"] if not re.search(r"\d", image[0])
    }


def _ranges(images: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {"offsets": [i[1] for i in images], "sizes": [i[2] for i in images], "count": len(images)}


def _group(key: str, meta: dict[str, Any], place: int) -> tuple[Any, int]:
    """Return the key that the frames of an episode share, and a number that increases over them."""
    episode = next((str(meta[name]) for name in _EPISODES if name in meta), None)
    if episode is not None:
        return ("episode", episode), place
    matched = re.fullmatch(r"(.*?)(\d{1,18})", key)
    return (("key", matched[1]), int(matched[2])) if matched else (("sample", place), 0)


def _number(meta: dict[str, Any], names: Sequence[str]) -> float:
    values = [meta[name] for name in names if isinstance(meta.get(name), (int, float))]
    return float(values[0]) if values and 0 < values[0] < 1e6 else 0.0


def read_shard(file: Path, sha256: Callable[[], str] | None) -> ShardIndex | None:
    """Return the JSON file next to a tar after checking both; None if it is missing or not ours.

    Args:
        file: the tar.
        sha256: returns the current hash of the tar; None: it is not checked.

    Raises:
        Unreadable: the tar or its JSON file was truncated or altered.
        UserError: the JSON file is from a newer release.
        OSError: the tar does not exist.
    """
    beside = file.with_suffix(".json")
    try:
        values = parse_json(read_text(beside), str(beside)) if beside.is_file() else None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            return None
        shard = parse_record(ShardIndex, values, str(beside)) if values.get("version") == VERSION else None
    except UserError as error:
        raise Unreadable(str(error).rstrip(".")) from error
    if shard is None:
        raise UserError(
            f"{beside} must have version {VERSION}, got {values.get('version')!r}. Update latentact, or make "
            f"the shards again."
        )
    if shard.digest and shard.digest != _digest(values):
        raise Unreadable(f"{beside.name} was altered: its values do not have the hash that it names")
    size = file.stat().st_size
    if size != shard.bytes:
        raise Unreadable(f"it must have {shard.bytes} bytes, got {size}: it was truncated or altered")
    if sha256 and sha256() != shard.sha256:
        raise Unreadable("it was altered: its bytes do not match its JSON file")
    return shard
