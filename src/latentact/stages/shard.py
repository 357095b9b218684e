"""Write a dataset as WebDataset shards: `latentact shard --data DIR --out DIR`.

Threads turn episodes into drafts in any order; the drafts are concatenated in the order of the data. A shard
is finished when its JSON file exists, so that neither a kill nor the number of workers changes a byte.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout

from latentact.config import Between, OneOf, Pixels, Seconds, Workers, check_bounds
from latentact.data.cache import DataConfig, resolve_source
from latentact.data.decode.pipeline import DecodeSpec, unreadable_message
from latentact.data.digest import blake2b
from latentact.data.format import Unreadable
from latentact.data.shard_writer import CODECS, ClipSettings, Draft, DraftWriter
from latentact.data.tars import (
    FORMAT,
    MANIFEST,
    TAR_END,
    VERSION,
    WORK,
    ShardClip,
    ShardEpisode,
    ShardIndex,
    file_sha256,
    read_shard,
    sealed,
    write_record,
)
from latentact.errors import UserError, require_one_of
from latentact.io.atomic import disk_full, read_object, write_json
from latentact.io.records import read_record
from latentact.progress import Progress

log = logging.getLogger(__name__)

CUTS = ("auto", "always", "never")
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Write a dataset as shards: tars of clips that any WebDataset reader streams, with byte ranges."""

    data: DataConfig
    """LeRobot dataset, folder of videos or npz episodes, one video, shards, or hub id of a dataset."""
    out: str
    """Folder of the shards."""
    codec: Annotated[str, OneOf(CODECS)] = "jpeg"
    """jpeg or png (exact): an image per frame, read in any order; mp4: smallest, decoded into the cache."""
    quality: Annotated[int, Between(1, 100)] = 90
    """Quality of JPEG."""
    shard_size_mb: Annotated[float, Between(0.001, 10**6)] = 512.0
    """Size at which a new shard starts, in 10^6 bytes; a scene is split only if it is larger by itself."""
    resolution: Pixels = 0
    """Height and width in pixels to which frames are resized; 0: keep the size."""
    clip_frames: Annotated[int, Between(2, 9999)] = 64
    """Maximum frames per clip (a sample of a WebDataset reader); our reader joins the clips of a scene."""
    min_frames: Annotated[int, Between(1, 9999)] = 2
    """Scenes with fewer frames are dropped."""
    cuts: Annotated[str, OneOf(CUTS)] = "auto"
    """Split episodes at scene cuts: always, never, or auto: in plain video only."""
    drop_still_s: Seconds = 0.0
    """Drop spans in which nothing changes for this many seconds; 0: keep them."""
    drop_duplicates: bool = False
    """Drop episodes with the same frames as an earlier one."""
    workers: Workers = 0
    """Threads; 0: one per core. Does not affect the shards."""
    verify: bool = False
    """Check the hashes of finished shards, and rewrite altered ones."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)
        for name, value, choices in (("--codec", self.codec, CODECS), ("--cuts", self.cuts, CUTS)):
            require_one_of(name, value, choices)


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Result of `latentact shard`."""

    path: Path
    """The folder."""
    manifest: dict[str, Any]
    """Content of `manifest.json`."""

    def to_json(self) -> dict[str, Any]:
        """Return the path and the manifest."""
        return {"path": str(self.path), **self.manifest}


def run(config: ShardConfig) -> ShardResult:
    """Write the shards that are missing.

    Raises:
        UserError: the data cannot be read or is not video, an episode is unreadable and `strict` is set,
            nothing is left to write, the folder holds other files or is in use, or the disk is full.
    """
    out = Path(config.out)
    spec, key, memo = resolve_source(replace(config.data, resolution=config.resolution))
    with suppress(OSError):  # full or read-only disk: only bookkeeping is lost
        memo.save()
    source = spec.source
    if not source.resizable:
        raise UserError(f"{config.data.path} must hold images to be sharded, got grids of integers.")
    settings = ClipSettings(
        codec=config.codec,
        quality=config.quality if config.codec == "jpeg" else 0,
        clip_frames=config.clip_frames,
        min_frames=config.min_frames,
        cuts=config.cuts == "always" or (config.cuts == "auto" and source.scene_cuts),
        still_s=config.drop_still_s,
        duplicates=config.drop_duplicates,
    )
    tasks = blake2b(*(episode.task.encode() for episode in source.episodes))
    identity = {"frames": key.name, "tasks": tasks, "shard_size_mb": config.shard_size_mb, **asdict(settings)}
    try:
        if (out / MANIFEST).is_file():
            _require_same(out / MANIFEST, identity, out)
            if _complete(out, config.verify):
                log.info("%s is already finished", out)
                shutil.rmtree(out / WORK, ignore_errors=True)
                return ShardResult(path=out, manifest=read_object(out / MANIFEST))
            (out / MANIFEST).unlink()
        with _locked(out, identity):
            shards = _write_or_clear(spec, settings, config, out)
            manifest = _manifest(spec, identity, shards)
            write_json(out / MANIFEST, manifest)
    except OSError as error:
        if not disk_full(error):
            raise
        raise UserError(f"the disk of {out} is full. Free some space and re-run the command.") from error
    shutil.rmtree(out / WORK, ignore_errors=True)
    return ShardResult(path=out, manifest=manifest)


def _require_same(file: Path, identity: dict[str, Any], out: Path) -> None:
    held = read_object(file).get("settings")
    held = held if isinstance(held, dict) else {}
    if changed := [name for name in identity if held.get(name) != identity[name]]:
        name = changed[0]
        what = f"with {name} = {held.get(name)!r}, not {identity[name]!r}"
        if name in ("frames", "tasks"):  # hashes
            what = f"of other {name}: another dataset, camera, --resolution or --target-fps"
        raise UserError(f"{out} holds shards {what}. Choose another --out, or delete the folder.")


@contextmanager
def _locked(out: Path, identity: dict[str, Any]) -> Generator[None]:
    """Lock the folder for this process and these settings."""
    work, known = out / WORK, {MANIFEST, WORK}
    if out.is_file():
        raise UserError(f"{out} must be a folder, got a file. Choose another --out.")
    others = [f.name for f in out.iterdir() if f.name not in known] if out.is_dir() else []
    if not work.is_dir() and any(not name.startswith("shard-") for name in others):
        raise UserError(f"{out} holds other files, such as {others[0]}. Choose another --out.")
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work / "lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another process writes shards in {out}. Wait for it, or choose another --out."
        ) from error
    with lock:
        note = work / "settings.json"
        if note.is_file():
            _require_same(note, identity, out)
        else:
            write_json(note, {"settings": identity})
        yield


def _complete(out: Path, verify: bool) -> bool:
    count = read_object(out / MANIFEST).get("shards")
    return all(_finished(_tar(out, index), verify) is not None for index in range(int(count or 0)))


def _tar(out: Path, index: int) -> Path:
    return out / f"shard-{index:06d}.tar"


def _finished(tar: Path, verify: bool) -> ShardIndex | None:
    """Return a finished shard; None if it is missing, truncated or, with `verify`, altered."""
    try:
        return read_shard(tar, functools.partial(file_sha256, tar) if verify else None)
    except (UserError, Unreadable, OSError):
        return None


def _write_or_clear(
    spec: DecodeSpec, settings: ClipSettings, config: ShardConfig, out: Path
) -> list[ShardIndex]:
    """Return all shards; leave nothing behind if the data yields none."""
    try:
        return _write_shards(spec, settings, config, out)
    except UserError:
        if not any(out.glob("shard-*.json")):
            shutil.rmtree(out / WORK, ignore_errors=True)
            with suppress(OSError):
                out.rmdir()
        raise


def _write_shards(
    spec: DecodeSpec, settings: ClipSettings, config: ShardConfig, out: Path
) -> list[ShardIndex]:
    """Return all shards, in order, after writing those that are missing."""
    shards: list[ShardIndex] = []
    total = len(spec.source.episodes)
    place, digests = (0, 0), set[str]()
    writer = DraftWriter(spec, settings, out / WORK)

    def finished(first: tuple[int, int]) -> ShardIndex | None:
        shard = _finished(_tar(out, len(shards)), config.verify)
        return shard if shard and shard.first == first else None

    with Progress("sharding", total, "episodes") as progress:
        while place[0] < total:
            done = len(shards)
            if shard := finished(place):
                shards.append(_light(shard))
                progress.advance(shard.next[0] - place[0])
            else:
                if shards:
                    log.info("continuing after %d shards", len(shards))
                assembly = _Assembly(spec, config, out, shards, place, digests)
                with closing(_drafts(writer, range(place[0], total), config.workers)) as drafts:
                    for draft in drafts:
                        if assembly.add(draft, finished):
                            break
                        progress.advance(1)
                    else:
                        assembly.close((total, 0))
            place = shards[-1].next
            digests |= {episode.digest for shard in shards[done:] for episode in shard.episodes}
    for stale in sorted(out.glob("shard-*")):
        if int(stale.stem.removeprefix("shard-")) >= len(shards):
            stale.unlink()
    return shards


def _light(shard: ShardIndex) -> ShardIndex:
    """Return a shard without its byte ranges, to save memory."""
    ranges = {"offsets": (), "sizes": ()}
    return shard.model_copy(update={"clips": tuple(clip.model_copy(update=ranges) for clip in shard.clips)})


def _drafts(writer: DraftWriter, numbers: range, workers: int) -> Generator[Draft]:
    """Yield the drafts of these episodes in order; threads work ahead."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(numbers)) or 1

    def make(number: int) -> Draft:
        done = writer.folder / f"{number:06d}.json"
        try:
            return read_record(Draft, done) if done.is_file() else writer.write(number)
        except UserError:  # damaged by a full disk
            return writer.write(number)

    with ThreadPoolExecutor(workers, thread_name_prefix="shard") as pool:
        ahead: deque[Future[Draft]] = deque()
        remaining = iter(numbers)
        try:
            for number in remaining:
                ahead.append(pool.submit(make, number))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Assembly:
    """Concatenate drafts, in order, into shards."""

    def __init__(
        self,
        spec: DecodeSpec,
        config: ShardConfig,
        out: Path,
        shards: list[ShardIndex],
        place: tuple[int, int],
        digests: set[str],
    ) -> None:
        self._spec, self._config, self._out, self._shards = spec, config, out, shards
        self._first, self._skip = place, place
        """Start of the open shard, and start of the whole assembly."""
        self._digests = digests - {""}
        self._limit = round(config.shard_size_mb * 1e6)
        self._partial = out / WORK / "shard.tar"
        self._file = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._clips: list[ShardClip] = []
        self._episodes: list[ShardEpisode] = []

    def add(self, draft: Draft, finished: Callable[[tuple[int, int]], ShardIndex | None]) -> bool:
        """Add an episode; return whether the next shard is finished already, so that this ends here."""
        episode, number = draft.episode, draft.episode.number
        if episode.unreadable:
            label = self._spec.source.episodes[number].label
            message = unreadable_message({label: episode.unreadable})
            if self._spec.strict:
                raise UserError(message)
            log.warning("skipped %s", message)
        begin = self._skip[1] if number == self._skip[0] else 0
        clips = list(zip(draft.clips, draft.spans, strict=True))
        if episode.digest and episode.digest in self._digests and not begin:
            kept = episode.frames - episode.still - episode.short
            episode, clips = episode.model_copy(update={"duplicate": kept}), []
        self._digests |= {episode.digest} - {""}
        scenes = {
            clip.scene: sum(s[1] for c, s in clips[begin:] if c.scene == clip.scene) for clip, _ in clips
        }
        for index, (clip, (offset, size)) in enumerate(clips):
            if index < begin:
                continue
            starts = index == begin or clips[index - 1][0].scene != clip.scene
            needed = scenes[clip.scene] if starts and scenes[clip.scene] <= self._limit else size
            if (
                self._clips
                and self._file.tell() + needed > self._limit
                and (starts or not self._fits(scenes, clip))
            ):
                self.close((number, index))
                if finished((number, index)):
                    return True
            self._append(clip, number, offset, size)
        self._episodes.append(episode)
        return False

    def _fits(self, scenes: dict[int, int], clip: ShardClip) -> bool:
        return scenes[clip.scene] <= self._limit

    def _append(self, clip: ShardClip, number: int, offset: int, size: int) -> None:
        shift = self._file.tell() - offset
        with (self._out / WORK / f"{number:06d}.tar").open("rb") as draft:
            draft.seek(offset)
            while size:
                block = draft.read(min(size, _CHUNK))
                if not block:
                    raise UserError(f"{draft.name} is truncated. Delete it and re-run the command.")
                self._file.write(block)
                self._hash.update(block)
                size -= len(block)
        moved: dict[str, Any] = {"offsets": tuple(place + shift for place in clip.offsets)}
        for name in ("video", "action", "state"):
            if (place := getattr(clip, name)) is not None:
                moved[name] = (place[0] + shift, place[1])
        self._clips.append(clip.model_copy(update=moved))

    def close(self, place: tuple[int, int]) -> None:
        """Finish the open shard; the next one begins with this episode and clip.

        Raises:
            UserError: there is nothing to write.
        """
        if not self._clips:
            raise UserError(
                f"{self._config.data.path} must have a scene of at least {self._config.min_frames} frames, "
                f"got none. {_losses(self._episodes)}."
            )
        self._file.write(TAR_END)
        self._hash.update(TAR_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        source, tar = self._spec.source, _tar(self._out, len(self._shards))
        shard = ShardIndex(
            format=FORMAT,
            version=VERSION,
            bytes=self._file.tell(),
            sha256=self._hash.hexdigest(),
            camera=source.camera,
            action_space=source.action_space and vars(source.action_space),  # type: ignore[arg-type]
            action_names=tuple(source.action_names),
            first=self._first,
            next=place,
            episodes=tuple(self._episodes),
            clips=tuple(self._clips),
        )
        self._file.close()
        self._partial.replace(tar)
        write_record(tar.with_suffix(".json"), sealed(shard))
        self._shards.append(_light(shard))
        for draft in (self._out / WORK).glob("[0-9]*"):
            if int(draft.stem) < place[0]:
                draft.unlink()
        self._file, self._hash = self._partial.open("wb"), hashlib.sha256()
        self._first, self._clips, self._episodes = place, [], []


def _losses(episodes: list[ShardEpisode]) -> str:
    unreadable = {episode.name: episode.unreadable for episode in episodes if episode.unreadable}
    dropped = {
        "still frames": sum(e.still for e in episodes),
        "frames of short scenes": sum(e.short for e in episodes),
        "frames of duplicates": sum(e.duplicate for e in episodes),
    }
    listed = ", ".join(f"{number} {what}" for what, number in dropped.items())
    return f"Dropped: {listed}, {unreadable_message(unreadable).rstrip('.')}"


def _manifest(spec: DecodeSpec, identity: dict[str, Any], shards: list[ShardIndex]) -> dict[str, Any]:
    """Return the content of the shards, what was dropped, and their provenance."""
    source, episodes = spec.source, [episode for shard in shards for episode in shard.episodes]
    scenes = {(clip.episode, clip.scene) for shard in shards for clip in shard.clips}
    unreadable = {**source.unreadable, **{e.name: e.unreadable for e in episodes if e.unreadable}}
    fps = spec.fps or source.fps
    frames = sum(clip.count for shard in shards for clip in shard.clips)
    return {
        "format": FORMAT,
        "version": VERSION,
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "episodes": len({episode for episode, _ in scenes}),
        "scenes": len(scenes),
        "clips": sum(len(shard.clips) for shard in shards),
        "frames": frames,
        "hours": round(frames / fps / 3600, 6),
        "fps": fps,
        "camera": source.camera,
        "cuts": sum(len(episode.cuts) for episode in episodes),
        "dropped": {
            "unreadable_files": len(unreadable),
            "skipped_files": len(source.skipped),
            "still_frames": sum(episode.still for episode in episodes),
            "short_scene_frames": sum(episode.short for episode in episodes),
            "duplicate_episodes": sum(bool(episode.duplicate) for episode in episodes),
            "duplicate_frames": sum(episode.duplicate for episode in episodes),
        },
        "unreadable": unreadable,
        "settings": identity,
        "source": blake2b(*(episode.content.encode() for episode in source.episodes)),
        "software": {"latentact": version("latentact")},
    }
