"""The latent action of every row of a dataset, computed once and kept for every later use.

Decoding, encoding and writing overlap. Work is cut into units (an episode; of short ones as many as fill a
batch), whose results are parts on disk: a killed run goes on with the next unit, and several processes
(RANK and WORLD_SIZE, as torchrun sets them) share the units. Batches never span two units, so that the same
numbers come out whoever computes them. What is computed lies in the cache, under a key made of the frames,
the weights and the gap.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Bool, Float32, Int64, UInt8

from latentact.checkpoint import read_json, whole_file, whole_folder, write_json
from latentact.config import to_dict
from latentact.data.build import Chunk
from latentact.data.cache import cache_folder
from latentact.data.digest import blake2b
from latentact.data.footage import Footage
from latentact.data.format import Unreadable
from latentact.data.progress import Progress
from latentact.errors import UserError
from latentact.lams.model import LatentActionModel
from latentact.types import LatentActionSpec

log = logging.getLogger(__name__)

_VERSION = 2
_CPU_BATCH = 32  # more rows at a time are no faster there, and take more memory


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Latent actions of every frame of a dataset's readable episodes, memory-mapped."""

    spec: LatentActionSpec
    """What they mean, at the data's rate."""
    key: str
    """Content key of the frames."""
    vectors: Float32[np.ndarray, "n k d"]
    """After the quantiser, where there is one; zeros where not valid."""
    continuous: Float32[np.ndarray, "n k d"]
    """Before it."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices, where there is a codebook."""
    valid: Bool[np.ndarray, " n"]
    """Whether the frame has a successor at the gap."""
    picks: Int64[np.ndarray, " n"]
    """Number of the frame among the episode's rows in the data."""
    episodes: Int64[np.ndarray, " e"]
    """Place of each episode in the data's list."""
    lengths: Int64[np.ndarray, " e"]
    """Frames of each of them."""
    unreadable: dict[str, str]
    """Episodes that cannot be read: name -> reason."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of several processes this one is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """Return what torchrun set; one process without it.

        Raises:
            UserError: RANK and WORLD_SIZE contradict each other.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < world:
            raise UserError(f"RANK is {rank} and WORLD_SIZE is {world}; start the processes with torchrun.")
        return cls(rank=rank, world=world)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How a dataset is encoded; decides speed, not results (but for rounding)."""

    batch_size: int = 256
    """Transitions encoded together."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    workers: int = 0
    """Decoding threads; 0: one per core."""
    cache_dir: str = ""
    """Where results are kept; empty: $LATENTACT_CACHE, or ~/.cache/latentact."""
    overwrite: bool = False
    """Whether to compute again what is there."""
    share: Share = field(default_factory=Share.of_environment)
    """Which of several processes this one is."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; wanted at least 1.")
        if self.workers < 0:
            raise UserError(f"--num-workers is {self.workers}; wanted at least 0.")


def gap_in_frames(spec: LatentActionSpec, fps: float, data: Path, seconds: float, remedy: str) -> int:
    """Return how many frames of the data a transition of the LAM spans.

    Args:
        spec: of the LAM.
        fps: frames per second of the data.
        data: what the message calls the data.
        seconds: gap to use; 0: that of the LAM, which is in frames where it knows no seconds.
        remedy: what the message advises.

    Raises:
        UserError: the data has no two frames that are nearly so far apart.
    """
    wanted = seconds or spec.frame_gap_s
    gap = round(wanted * fps) if wanted else spec.frame_gap
    if gap < 1 or (wanted and abs(gap / fps - wanted) > 0.25 * wanted):
        whose = "the frame gap asked for" if seconds else "the LAM's frame gap"
        raise UserError(f"{whose} is {wanted:g} s and {data} has a frame every {1 / fps:g} s; {remedy}.")
    return gap


def encode_dataset(
    model: LatentActionModel, footage: Footage, gap: int, options: EncodeOptions
) -> Encoded | None:
    """Return the latent actions of a dataset, computing what no earlier run has.

    Args:
        model: in evaluation mode, on the device.
        footage: the data.
        gap: frames between the two moments of a transition.
        options: how.

    Returns:
        None in every process but the first of several; that one waits for the others and joins the parts.

    Raises:
        UserError: no episode is long enough for a transition, none can be read, or the disk is full.
    """
    if max(footage.lengths) <= gap:
        raise UserError(
            f"the longest of {len(footage.lengths)} episodes of {footage.path} has {max(footage.lengths)} "
            f"frames, and a window needs {gap + 1} (frame gap {gap}); use a smaller gap or longer videos."
        )
    share = options.share
    folder = cache_folder(options.cache_dir) / "tokens"
    spec = replace(model.spec, frame_gap=gap, frame_gap_s=gap / footage.fps, fps=footage.fps)
    settings = to_dict(model.config)  # some, like a window or a precision, change what weights give
    key = blake2b(json.dumps([_VERSION, footage.key, spec.weights, settings, gap]).encode())
    again = ".again" if options.overwrite else ""
    entry, parts = folder / key, folder / f"{key}.{options.batch_size}.{options.device}{again}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if share.rank == 0:
            stack.enter_context(FileLock(folder / f"{key}.lock"))
        if options.overwrite or not entry.is_dir():
            units = _units(footage.lengths, options.batch_size)
            _encode(model, footage, gap, options, units, parts)
            if share.rank == 0:
                _join(parts, len(units), entry, spec, footage)
            elif entry.is_dir() and not options.overwrite:
                shutil.rmtree(parts, ignore_errors=True)  # the first process had all it needed
        else:
            log.info("the latent actions of %s are in the cache", footage.path)
        return _load(entry, footage, spec) if share.rank == 0 else None


def _units(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return runs of episodes that together fill a batch, or single episodes that do."""
    units, size = [], batch_size
    for number, length in enumerate(lengths):
        if size + length > batch_size:
            units.append([])
            size = 0
        units[-1].append(number)
        size += length
    return units


def _part(parts: Path, unit: int) -> Path:
    return parts / f"{unit:08d}.npz"


def _encode(
    model: LatentActionModel,
    footage: Footage,
    gap: int,
    options: EncodeOptions,
    units: Sequence[Sequence[int]],
    parts: Path,
) -> None:
    """Write the parts of this process that are not there yet."""
    parts.mkdir(exist_ok=True)
    mine = range(options.share.rank, len(units), options.share.world)
    missing = [unit for unit in mine if not _part(parts, unit).exists()]
    sizes = {unit: sum(footage.lengths[number] for number in units[unit]) for unit in mine}
    total = sum(sizes.values())
    done = total - sum(sizes[unit] for unit in missing)
    numbers = [number for unit in missing for number in units[unit]]
    with (
        Progress("encoding", total, "frames", done=done) as progress,
        closing(footage.episodes(numbers, options.workers)) as episodes,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        _encoders(options.device) as (encoders, most),
    ):
        waiting: deque[Future[None]] = deque()
        for unit in missing:
            run = _Unit(model, gap, options, encoders)
            for _ in units[unit]:
                number, chunks = next(episodes)
                for future in run.episode(number, chunks, progress):
                    waiting.append(future)
                    if len(waiting) > most:
                        waiting.popleft().result()
            waiting += run.end(writer, _part(parts, unit))
        for future in waiting:
            future.result()


@contextmanager
def _encoders(device: str) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Yield threads that encode, and how many batches may wait.

    On a CPU each core takes a batch of its own. Cores that share a batch would make the last bits of the
    numbers depend on how many cores there are.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if device == "cpu" else 1, thread_name_prefix="encode")
    torch.set_num_threads(1)
    try:
        with pool:
            yield pool, 2 + (threads if device == "cpu" else 1)
    finally:
        torch.set_num_threads(threads)


class _Unit:
    """Encodes the frames of some episodes, holding only those of which a transition is still to be encoded.

    Positions count the unit's frames, also those of episodes that turn out to be damaged. A clip holds
    `stretch` transitions, each one gap after the one before, and is named by the first one's position.
    """

    def __init__(
        self, model: LatentActionModel, gap: int, options: EncodeOptions, encoders: ThreadPoolExecutor
    ) -> None:
        self._model, self._gap, self._device, self._encoders = model, gap, options.device, encoders
        self._stretch, self._context = model.stretch, model.context if model.stretch == 1 else 0
        most = min(options.batch_size, _CPU_BATCH if options.device == "cpu" else sys.maxsize)
        self._batch_size = max(1, most // self._stretch)
        self._offsets = np.arange(-self._context, self._stretch + 1) * gap
        self._held: list[UInt8[np.ndarray, "m h w c"]] = []
        self._base = self._end = self._next = 0
        self._clips = np.zeros((0, 3), np.int64)  # position, start and end of what is known of its episode
        self._episodes: dict[int, tuple[int, list[int]]] = {}
        self._unreadable: dict[int, str] = {}
        self._encoded: list[Future[dict[str, np.ndarray]]] = []

    def episode(self, number: int, chunks: Iterator[Chunk], progress: Progress) -> Iterator[Future[Any]]:
        """Take in an episode; yields what the encoders have to do."""
        start, picks = self._end, []
        self._next = start
        try:
            for chunk in chunks:
                self._end += len(chunk.frames)
                self._held.append(chunk.frames)
                picks += chunk.picks
                self._queue(start, self._stretch)
                while len(self._clips) >= self._batch_size:
                    yield self._batch(start)
                progress.advance(len(chunk.frames))
            self._queue(start, 1)
            self._episodes[number] = start, picks
        except Unreadable as error:
            self._unreadable[number] = str(error)
            self._clips = self._clips[self._clips[:, 0] < start]

    def end(self, writer: ThreadPoolExecutor, path: Path) -> Iterator[Future[Any]]:
        """Encode what is left, and write the part."""
        self._next = self._end
        while len(self._clips):
            yield self._batch(self._end)
        yield writer.submit(self._save, path)

    def _queue(self, start: int, transitions: int) -> None:
        """Queue the clips of which so many transitions can be seen."""
        until = max(self._next, self._end - transitions * self._gap)
        positions = np.arange(self._next, until)
        first = positions[(positions - start) // self._gap % self._stretch == 0]
        known = np.broadcast_to([[start, self._end]], (len(first), 2))
        self._clips = np.concatenate([self._clips, np.column_stack([first, known])])
        self._next = until

    def _batch(self, start: int) -> Future[Any]:
        """Encode the oldest clips, and let go of frames that no later clip looks at."""
        clips, self._clips = self._clips[: self._batch_size], self._clips[self._batch_size :]
        frames = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
        wanted = clips[:, :1] + self._offsets
        inside = np.clip(wanted, clips[:, 1:2], clips[:, 2:] - 1)
        low, high = int(inside.min()), int(inside.max()) + 1
        seen = frames[low - self._base : high - self._base]
        future = self._encoders.submit(self._encode, wanted, seen, inside - low, wanted == inside)
        self._encoded.append(future)
        needed = max(start, self._next + self._offsets[0])
        if len(self._clips):
            needed = min(needed, max(self._clips[0, 1], self._clips[0, 0] + self._offsets[0]))
        self._held = [frames[needed - self._base :]]
        self._base = needed
        return future

    @torch.inference_mode()
    def _encode(
        self, wanted: np.ndarray, frames: np.ndarray, places: np.ndarray, valid: np.ndarray
    ) -> dict[str, np.ndarray]:
        seen = torch.from_numpy(frames).to(self._device)
        clips = seen[torch.from_numpy(places).to(seen.device)].permute(0, 1, 4, 2, 3)
        known = torch.from_numpy(valid).to(seen.device)
        latent = self._model.encode(clips, known, last=self._stretch == 1)
        real = valid[:, 1 + self._context :]
        found = {"vectors": latent.vectors, "continuous": latent.continuous, "codes": latent.codes}
        numbers = {k: v.numpy(force=True)[real] for k, v in found.items() if v is not None}
        return {"rows": wanted[:, self._context : -1][real], **numbers}

    def _save(self, path: Path) -> None:
        kept = [np.arange(start, start + len(picks)) for start, picks in self._episodes.values()]
        positions = np.concatenate([np.zeros(0, np.int64), *kept])
        arrays: dict[str, Any] = {
            "episodes": np.array([*self._episodes], np.int64),
            "lengths": np.array([len(each) for each in kept], np.int64),
            "picks": np.array([p for _, picks in self._episodes.values() for p in picks], np.int64),
            "valid": np.zeros(len(positions), bool),
            "unreadable": np.array(json.dumps(self._unreadable)),
        }
        for future in self._encoded:
            batch = future.result()
            inside = np.isin(batch["rows"], positions)
            at = np.searchsorted(positions, batch.pop("rows")[inside])
            arrays["valid"][at] = True
            for name, values in batch.items():
                if name not in arrays:
                    arrays[name] = np.zeros((len(positions), *values.shape[1:]), values.dtype)
                arrays[name][at] = values[inside]
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        with whole_file(path) as partial:
            partial.write_bytes(buffer.getvalue())


def _join(parts: Path, count: int, entry: Path, spec: LatentActionSpec, footage: Footage) -> None:
    """Put all parts together, in order, once the other processes have written theirs."""
    paths, said = [_part(parts, unit) for unit in range(count)], False
    while missing := [path for path in paths if not path.exists()]:
        if not said:
            log.info("waiting for other processes, which have %d parts to write", len(missing))
        said = True
        time.sleep(0.1)
    k, d, codes = spec.tokens, spec.token_dim, spec.codebook_size is not None
    kinds: dict[str, tuple[type, tuple[int, ...]]] = {
        **dict.fromkeys(("vectors", "continuous"), (np.float32, (k, d))),
        **({"codes": (np.int64, (k,))} if codes else {}),
        **{"valid": (np.bool_, ()), "picks": (np.int64, ())},
    }
    lengths, episodes, unreadable = [], [], {}
    for path in paths:
        with np.load(path) as part:
            lengths.append(part["lengths"])
            episodes.append(part["episodes"])
            unreadable |= json.loads(str(part["unreadable"]))
    broken = {footage.source.episodes[int(number)].label: why for number, why in unreadable.items()}
    rows = int(sum(each.sum() for each in lengths))
    with whole_folder(entry) as folder:
        np.save(folder / "lengths.npy", np.concatenate(lengths))
        np.save(folder / "episodes.npy", np.concatenate(episodes))
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for name, (dtype, shape) in kinds.items():
                files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, *shape)}
                np.lib.format.write_array_header_1_0(files[name], header)
            for path in paths:
                with np.load(path) as part:
                    for name, (dtype, shape) in kinds.items():
                        none = np.zeros((len(part["valid"]), *shape), dtype)
                        files[name].write(
                            part[name].astype(dtype).tobytes() if name in part else none.tobytes()
                        )
        write_json(
            folder / "meta.json",
            {"spec": asdict(spec), "camera": footage.source.camera, "rows": rows, "unreadable": broken},
        )
    shutil.rmtree(parts)


def _load(entry: Path, footage: Footage, spec: LatentActionSpec) -> Encoded:
    meta = read_json(entry / "meta.json")
    with whole_file(entry / "used") as draft:
        draft.write_text(f"{footage.path.resolve()}\n")
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in entry.glob("*.npy") if path.stat().st_size}
    return Encoded(
        spec=spec,
        key=footage.key,
        vectors=arrays["vectors"],
        continuous=arrays["continuous"],
        codes=arrays.get("codes"),
        valid=arrays["valid"],
        picks=arrays["picks"],
        episodes=arrays["episodes"],
        lengths=arrays["lengths"],
        unreadable=meta["unreadable"],
    )
