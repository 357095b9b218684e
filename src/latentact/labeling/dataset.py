"""The latent action of every row of a dataset, computed once and kept for every later use.

Decoding, encoding and writing overlap. Work is cut into units (an episode; of short ones as many as fill a
batch), whose results are parts on disk: a killed run goes on with the next unit, and several processes
(RANK and WORLD_SIZE, as torchrun sets them) share the units. Batches never span two units, so that the same
numbers come out whoever computes them. What is computed lies in the cache, under a key made of the frames,
the weights and the gap.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from jaxtyping import Bool, Float32, Int64

from latentact.config import to_dict
from latentact.data.cache import cache_folder, writable
from latentact.data.decode.pipeline import unreadable_message
from latentact.data.digest import blake2b
from latentact.data.stream import FrameStream
from latentact.device import supports_int8
from latentact.errors import UserError, did_you_mean
from latentact.io.arrays import load_npy, load_npz
from latentact.io.atomic import atomic_dir, atomic_write, write_json
from latentact.io.records import Record, read_record
from latentact.labeling.episode import Unit, encoders
from latentact.labeling.precision import PRECISIONS, States, prepared, select_precision
from latentact.lams.contract import LatentActionModel
from latentact.progress import Progress
from latentact.types import LatentActionSpec

log = logging.getLogger(__name__)

_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class DatasetLatents:
    """Latent actions of every frame of a dataset's readable episodes, memory-mapped."""

    spec: LatentActionSpec
    """What they mean, at the data's rate."""
    key: str
    """Content key of the frames."""
    vectors: Float32[np.ndarray, "n k d"]
    """After the quantizer, where there is one; zeros where not valid."""
    continuous: Float32[np.ndarray, "n k d"]
    """Before it."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices, where there is a codebook."""
    valid: Bool[np.ndarray, " n"]
    """Whether the frame has a successor at the gap."""
    frame_indices: Int64[np.ndarray, " n"]
    """Number of the frame among the episode's rows in the data."""
    episodes: Int64[np.ndarray, " e"]
    """Place of each episode in the data's list."""
    lengths: Int64[np.ndarray, " e"]
    """Frames of each of them."""
    unreadable: dict[str, str]
    """Episodes that cannot be read: name -> reason."""
    precision: str
    """fp32, bf16 or int8, as they were computed."""


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
    """How a dataset is encoded; decides speed, not results (but for rounding).

    Raises:
        UserError: a value is unknown or too small.
    """

    batch_size: int = 256
    """Transitions encoded together."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    precision: str = "fp32"
    """fp32; bf16, faster and with other last digits; int8, faster still and coarser; or auto: the fastest
    that the hardware multiplies natively and that keeps 99 % of the codes of the data's first transitions."""
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
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision is {self.precision!r}{did_you_mean(self.precision, PRECISIONS)}")
        if self.precision == "int8" and not supports_int8(self.device):
            raise UserError(
                f"--precision is int8, which wants a CPU with VNNI and not this {self.device}; give auto."
            )


def require_gap(seconds: float) -> None:
    """Refuse a frame gap that is no time, before any frame is decoded.

    Raises:
        UserError: it is negative or not finite.
    """
    if not 0 <= seconds < math.inf:
        raise UserError(f"--frame-gap-s is {seconds:g}; wanted seconds, at least 0.")


def gap_in_frames(spec: LatentActionSpec, fps: float, data: Path, seconds: float, remedy: str = "") -> int:
    """Return how many frames of the data a transition of the LAM spans.

    Args:
        spec: of the LAM.
        fps: frames per second of the data.
        data: what the message calls the data.
        seconds: gap to use; 0: that of the LAM, which is in frames where it knows no seconds.
        remedy: what the message advises; empty: the nearest gap that the data has.

    Raises:
        UserError: the data has no two frames that are nearly so far apart.
    """
    wanted = seconds or spec.frame_gap_s
    gap = round(wanted * fps) if wanted else spec.frame_gap
    if gap < 1 or (wanted and abs(gap / fps - wanted) > 0.25 * wanted):
        whose = "the frame gap asked for" if seconds else "the LAM's frame gap"
        remedy = remedy or f"give --frame-gap-s {max(gap, 1) / fps:g}, the nearest, or data at another rate"
        raise UserError(f"{whose} is {wanted:g} s and {data} has a frame every {1 / fps:g} s; {remedy}.")
    return gap


def encode_dataset(
    model: LatentActionModel, stream: FrameStream, gap: int, options: EncodeOptions
) -> DatasetLatents | None:
    """Return the latent actions of a dataset, computing what no earlier run has.

    Args:
        model: in evaluation mode, on the device.
        stream: the data.
        gap: frames between the two moments of a transition.
        options: how.

    Returns:
        None in every process but the first of several; that one waits for the others and joins the parts.

    Raises:
        UserError: no episode is long enough for a transition, none can be read, or the disk is full.
    """
    if max(stream.lengths) <= gap:
        raise UserError(
            f"the longest of {len(stream.lengths)} episodes of {stream.path} has {max(stream.lengths)} "
            f"frames, and a window needs {gap + 1} (frame gap {gap}); use a smaller gap or longer videos."
        )
    states = _states(model, stream)
    if options.precision == "auto":
        fastest = select_precision(model, stream, gap, options.device, options.workers, states)
        log.info("computing in %s", fastest)
        options = replace(options, precision=fastest)
    share = options.share
    folder = cache_folder(options.cache_dir) / "tokens"
    spec = replace(model.spec, frame_gap=gap, frame_gap_s=gap / stream.fps, fps=stream.fps)
    settings = to_dict(model.config)  # some, like a window, change what weights give
    identity = [_VERSION, stream.key, spec.weights, settings, gap, options.precision]
    if not stream.usable.all():
        identity.append(blake2b(np.packbits(stream.usable).tobytes()))
    key = blake2b(json.dumps(identity).encode())
    again = ".again" if options.overwrite else ""
    entry, parts = folder / key, folder / f"{key}.{options.batch_size}.{options.device}{again}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if share.rank == 0:
            stack.enter_context(FileLock(writable(folder / f"{key}.lock")))
        found = None if options.overwrite else _read(entry, spec)
        if found is None:
            units = _units(stream.lengths, options.batch_size)
            _encode(prepared(model, options.precision), stream, gap, options, units, parts, states)
            if share.rank == 0:
                _join(parts, len(units), entry, spec, stream)
                found = _read(entry, spec)
            elif entry.is_dir() and not options.overwrite:
                shutil.rmtree(parts, ignore_errors=True)  # the first process had all it needed
        else:
            log.info("the latent actions of %s are in the cache", stream.path)
        mine = found if share.rank == 0 else None
        encoded = _encoded(*mine, entry, stream, spec, options.precision) if mine else None
    if encoded and not encoded.valid.any():
        raise UserError(
            f"no two frames of {stream.path} are {gap / stream.fps:g} s apart (frame gap {gap}); see their "
            f"times with latentact check-data."
        )
    if encoded and (broken := {**stream.source.unreadable, **encoded.unreadable}):
        if stream.strict:
            raise UserError(unreadable_message(broken))
        log.warning("%s: skipped %s", stream.path, unreadable_message(broken))
    return encoded


def _states(model: LatentActionModel, stream: FrameStream) -> States | None:
    """Return what tells the robot's state at rows; None for a model that does not observe it."""
    if not model.state_size:
        return None
    column = stream.state
    size = 0 if column is None else column.shape[1]
    if column is None or size != model.state_size:
        raise UserError(
            f"the LAM observes a robot state of {model.state_size} numbers and {stream.path} has {size}; "
            f"give data with that `observation.state`."
        )

    def at(number: int, frame_indices: Sequence[int]) -> np.ndarray:
        return column[stream.source.first_rows[number] + np.asarray(frame_indices)]

    return at


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
    stream: FrameStream,
    gap: int,
    options: EncodeOptions,
    units: Sequence[Sequence[int]],
    parts: Path,
    states: States | None,
) -> None:
    """Write the parts of this process that are not there yet."""
    parts.mkdir(exist_ok=True)
    mine = range(options.share.rank, len(units), options.share.world)
    missing = [unit for unit in mine if not _part(parts, unit).exists()]
    sizes = {unit: sum(stream.lengths[number] for number in units[unit]) for unit in mine}
    total = sum(sizes.values())
    done = total - sum(sizes[unit] for unit in missing)
    numbers = [number for unit in missing for number in units[unit]]
    with (
        Progress("encoding", total, "frames", done=done) as progress,
        closing(stream.episodes(numbers, options.workers)) as episodes,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        encoders(options.device) as (pool, most),
    ):
        waiting: deque[Future[None]] = deque()
        for unit in missing:
            run = Unit(
                model,
                gap,
                pool,
                batch_size=options.batch_size,
                device=options.device,
                precision=options.precision,
                states=states,
                transitions=stream.transitions,
            )
            for _ in units[unit]:
                number, chunks = next(episodes)
                for future in run.episode(number, chunks, progress):
                    waiting.append(future)
                    if len(waiting) > most:
                        waiting.popleft().result()
            waiting += run.end(writer, _part(parts, unit))
        for future in waiting:
            future.result()


def _join(parts: Path, count: int, entry: Path, spec: LatentActionSpec, stream: FrameStream) -> None:
    """Put all parts together, in order, once the other processes have written theirs."""
    paths, said = [_part(parts, unit) for unit in range(count)], False
    while missing := [path for path in paths if not path.exists()]:
        if not said:
            log.info("waiting for other processes, which have %d parts to write", len(missing))
        said = True
        time.sleep(0.1)
    kinds = _kinds(spec)
    lengths, episodes, unreadable = [], [], {}
    for path in paths:
        try:
            part = load_npz(path, "run the same command again", ("lengths", "episodes", "unreadable"))
            lengths.append(part["lengths"])
            episodes.append(part["episodes"])
            unreadable |= json.loads(str(part["unreadable"]))
        except (UserError, ValueError, KeyError) as error:
            path.unlink()
            raise UserError(f"{path} is damaged and was removed; run the same command again.") from error
    broken = {stream.source.episodes[int(number)].label: why for number, why in unreadable.items()}
    rows = int(sum(each.sum() for each in lengths))
    if not rows:
        shutil.rmtree(parts)
        raise UserError(
            f"nothing is left to read: {unreadable_message({**stream.source.unreadable, **broken})}"
        )
    with atomic_dir(entry) as folder:
        np.save(folder / "lengths.npy", np.concatenate(lengths))
        np.save(folder / "episodes.npy", np.concatenate(episodes))
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for name, (dtype, shape) in kinds.items():
                files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, *shape)}
                np.lib.format.write_array_header_1_0(files[name], header)
            for path in paths:
                part = load_npz(path, "delete it and run the same command again")
                for name, (dtype, shape) in kinds.items():
                    none = np.zeros((len(part["valid"]), *shape), dtype)
                    files[name].write(part.get(name, none).astype(dtype).tobytes())
        write_json(
            folder / "meta.json",
            {"spec": asdict(spec), "camera": stream.source.camera, "rows": rows, "unreadable": broken},
        )
    shutil.rmtree(parts)


class _Meta(Record):
    """`meta.json` of what was computed."""

    rows: int
    unreadable: dict[str, str]


def _read(entry: Path, spec: LatentActionSpec) -> tuple[_Meta, dict[str, np.ndarray]] | None:
    """Return what an earlier run has computed; None: nothing, or it is damaged."""
    if not entry.is_dir():
        return None
    try:
        meta = read_record(_Meta, entry / "meta.json")
        arrays = {
            name: load_npy(entry / f"{name}.npy", "it is made again") for name in ("lengths", "episodes")
        }
        wanted = {name: (dtype, (meta.rows, *shape)) for name, (dtype, shape) in _kinds(spec).items()}
        for name, (dtype, shape) in wanted.items():
            arrays[name] = load_npy(entry / f"{name}.npy", "it is made again")
            if arrays[name].dtype != dtype or arrays[name].shape != shape:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        whole = [
            arrays[name].dtype == np.int64 and arrays[name].ndim == 1 for name in ("lengths", "episodes")
        ]
        if (
            all(whole)
            and len(arrays["episodes"]) == len(arrays["lengths"])
            and arrays["lengths"].sum() == meta.rows
        ):
            return meta, arrays
    except (UserError, ValueError) as error:
        log.debug("%s", error)
    log.warning("the latent actions %s of the cache are damaged: they are computed again", entry.name)
    return None


def _kinds(spec: LatentActionSpec) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Return dtype and shape, without rows, of each array with a row per frame."""
    k, d = spec.tokens, spec.token_dim
    kinds: dict[str, tuple[type, tuple[int, ...]]] = dict.fromkeys(
        ("vectors", "continuous"), (np.float32, (k, d))
    )
    kinds |= {"codes": (np.int64, (k,))} if spec.codebook_size is not None else {}
    return kinds | {"valid": (np.bool_, ()), "frame_indices": (np.int64, ())}


def _encoded(
    meta: _Meta,
    arrays: dict[str, np.ndarray],
    entry: Path,
    stream: FrameStream,
    spec: LatentActionSpec,
    precision: str,
) -> DatasetLatents:
    with atomic_write(entry / "used") as draft:
        draft.write_bytes(os.fsencode(stream.path.resolve()) + b"\n")
    return DatasetLatents(
        spec=spec,
        key=stream.key,
        vectors=arrays["vectors"],
        continuous=arrays["continuous"],
        codes=arrays.get("codes"),
        valid=arrays["valid"],
        frame_indices=arrays["frame_indices"],
        episodes=arrays["episodes"],
        lengths=arrays["lengths"],
        unreadable=meta.unreadable,
        precision=precision,
    )
