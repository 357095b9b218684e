"""The latent actions of every row of a dataset, computed once and cached.

Decoding, encoding and writing overlap. Work is split into units (an episode, or as many short ones as fill a
batch), each written as a part: a killed run resumes with the next unit, and several processes (RANK and
WORLD_SIZE, as torchrun sets them) divide the units. Batches never span two units, so that results do not
depend on the process. Results are cached under a key of frames, weights and gap.
"""

from __future__ import annotations

import json
import logging
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
from jaxtyping import Int64

from latentact.config import to_dict
from latentact.data.cache import cache_folder, writable
from latentact.data.decode.pipeline import unreadable_message
from latentact.data.digest import blake2b
from latentact.data.latents import LatentSequence
from latentact.data.stream import FrameStream
from latentact.device import supports_int8
from latentact.errors import UserError, did_you_mean
from latentact.io.arrays import load_npy, load_npz
from latentact.io.atomic import atomic_dir, atomic_write, write_json
from latentact.io.records import Record, read_record
from latentact.labeling.episode import EpisodeEncoder, encoders
from latentact.labeling.precision import PRECISIONS, States, apply_precision, select_precision
from latentact.lams.contract import LatentActionModel, states_message
from latentact.progress import Progress
from latentact.types import LatentActionSpec

log = logging.getLogger(__name__)

_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class DatasetLatents(LatentSequence):
    """Latent actions of every frame of the readable episodes of a dataset, memory-mapped."""

    key: str
    """Content key of the frames."""
    frame_indices: Int64[np.ndarray, " n"]
    """Row of the frame within its episode in the data."""
    episodes: Int64[np.ndarray, " e"]
    """Index of each episode in the data."""
    lengths: Int64[np.ndarray, " e"]
    """Frames of each episode."""
    unreadable: dict[str, str]
    """Unreadable episodes: name -> reason."""
    precision: str
    """fp32, bf16 or int8."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rank of this process among several."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Shard:
        """Return the shard of torchrun's environment variables; a single process without them.

        Raises:
            UserError: RANK is not less than WORLD_SIZE.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < world:
            raise UserError(
                f"RANK must be between 0 and WORLD_SIZE - 1 = {world - 1}, got {rank}. Use torchrun."
            )
        return cls(rank=rank, world=world)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How a dataset is encoded; changes speed, not results beyond rounding.

    Raises:
        UserError: a value is unknown or too small.
    """

    batch_size: int = 256
    """Transitions encoded together."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    precision: str = "fp32"
    """fp32; bf16, faster, with other last digits; int8, fastest and coarsest; or auto: the fastest that the
    device supports natively and that preserves 99 % of the codes of the data's first transitions."""
    workers: int = 0
    """Decoding threads; 0: one per core."""
    cache_dir: str = ""
    """Folder of the cache; empty: $LATENTACT_CACHE, or ~/.cache/latentact."""
    overwrite: bool = False
    """Whether to ignore cached results."""
    shard: Shard = field(default_factory=Shard.from_environment)
    """Rank of this process among several."""

    def __post_init__(self) -> None:
        """Validate the options."""
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}.")
        if self.workers < 0:
            raise UserError(f"--num-workers must be at least 0, got {self.workers}.")
        if self.precision not in PRECISIONS:
            raise UserError(
                f"unknown --precision {self.precision!r}{did_you_mean(self.precision, PRECISIONS)}"
            )
        if self.precision == "int8" and not supports_int8(self.device):
            raise UserError(
                f"--precision must not be int8 on this {self.device}, which has no VNNI. Use auto."
            )


def encode_dataset(
    model: LatentActionModel, stream: FrameStream, gap: int, options: EncodeOptions
) -> DatasetLatents | None:
    """Return the latent actions of a dataset, from the cache if possible.

    Args:
        model: in evaluation mode, on the device.
        stream: the data.
        gap: frames between the two frames of a transition.
        options: how to encode.

    Returns:
        None in all but the first of several processes; that one waits for the others and joins the parts.

    Raises:
        UserError: no episode is long enough for a transition, none can be read, or the disk is full.
    """
    if max(stream.lengths) <= gap:
        raise UserError(
            f"episodes of {stream.path} must have at least {gap + 1} frames for a window (frame gap "
            f"{gap}), got {max(stream.lengths)} in the longest of {len(stream.lengths)}. Use a smaller gap "
            f"or longer videos."
        )
    states = _states(model, stream)
    if options.precision == "auto":
        fastest = select_precision(model, stream, gap, options.device, options.workers, states)
        log.info("computing in %s", fastest)
        options = replace(options, precision=fastest)
    shard = options.shard
    folder = cache_folder(options.cache_dir) / "tokens"
    spec = replace(model.spec, frame_gap=gap, frame_gap_s=gap / stream.fps, fps=stream.fps)
    settings = to_dict(model.config)  # some, like a window, change the results of the weights
    identity = [_VERSION, stream.key, spec.weights, settings, gap, options.precision]
    if not stream.usable.all():
        identity.append(blake2b(np.packbits(stream.usable).tobytes()))
    key = blake2b(json.dumps(identity).encode())
    again = ".again" if options.overwrite else ""
    entry, parts = folder / key, folder / f"{key}.{options.batch_size}.{options.device}{again}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if shard.rank == 0:
            stack.enter_context(FileLock(writable(folder / f"{key}.lock")))
        found = None if options.overwrite else _read(entry, spec)
        if found is None:
            units = _units(stream.lengths, options.batch_size)
            _encode(apply_precision(model, options.precision), stream, gap, options, units, parts, states)
            if shard.rank == 0:
                _join(parts, len(units), entry, spec, stream)
                found = _read(entry, spec)
            elif entry.is_dir() and not options.overwrite:
                shutil.rmtree(parts, ignore_errors=True)  # the first process has joined all parts
        else:
            log.info("the latent actions of %s are cached", stream.path)
        mine = found if shard.rank == 0 else None
        encoded = _encoded(*mine, entry, stream, spec, options.precision) if mine else None
    if encoded and not encoded.valid.any():
        raise UserError(
            f"{stream.path} must have frames {gap / stream.fps:g} s apart (frame gap {gap}), got none. "
            f"Check their times with latentact check-data."
        )
    if encoded and (broken := {**stream.source.unreadable, **encoded.unreadable}):
        if stream.strict:
            raise UserError(unreadable_message(broken))
        log.warning("%s: skipped %s", stream.path, unreadable_message(broken))
    return encoded


def _states(model: LatentActionModel, stream: FrameStream) -> States | None:
    """Return a function from rows to robot states; None for a model that does not use them."""
    if not model.state_size:
        return None
    column = stream.state
    size = 0 if column is None else column.shape[1]
    if column is None or size != model.state_size:
        raise UserError(states_message(model.spec, model.state_size, size, str(stream.path)))

    def at(number: int, frame_indices: Sequence[int]) -> np.ndarray:
        return column[stream.source.first_rows[number] + np.asarray(frame_indices)]

    return at


def _units(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group consecutive episodes into units of at most a batch; a longer episode is a unit of its own."""
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
    """Write the missing parts of this process."""
    parts.mkdir(exist_ok=True)
    mine = range(options.shard.rank, len(units), options.shard.world)
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
            run = EpisodeEncoder(
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
    """Join all parts, in order, once the other processes have written theirs."""
    paths, logged = [_part(parts, unit) for unit in range(count)], False
    while missing := [path for path in paths if not path.exists()]:
        if not logged:
            log.info("waiting for other processes to write %d parts", len(missing))
        logged = True
        time.sleep(0.1)
    kinds = _kinds(spec)
    lengths, episodes, unreadable = [], [], {}
    for path in paths:
        try:
            part = load_npz(path, "re-run the command", ("lengths", "episodes", "unreadable"))
            lengths.append(part["lengths"])
            episodes.append(part["episodes"])
            unreadable |= json.loads(str(part["unreadable"]))
        except (UserError, ValueError, KeyError) as error:
            path.unlink()
            raise UserError(f"{path} was damaged and has been removed. Re-run the command.") from error
    broken = {stream.source.episodes[int(number)].label: why for number, why in unreadable.items()}
    rows = int(sum(each.sum() for each in lengths))
    if not rows:
        shutil.rmtree(parts)
        raise UserError(
            f"no episode is readable: {unreadable_message({**stream.source.unreadable, **broken})}"
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
                part = load_npz(path, "delete it and re-run the command")
                for name, (dtype, shape) in kinds.items():
                    none = np.zeros((len(part["valid"]), *shape), dtype)
                    files[name].write(part.get(name, none).astype(dtype).tobytes())
        write_json(
            folder / "meta.json",
            {"spec": asdict(spec), "camera": stream.source.camera, "rows": rows, "unreadable": broken},
        )
    shutil.rmtree(parts)


class _Meta(Record):
    """`meta.json` of a cache entry."""

    rows: int
    unreadable: dict[str, str]


def _read(entry: Path, spec: LatentActionSpec) -> tuple[_Meta, dict[str, np.ndarray]] | None:
    """Return a cache entry; None if it is missing or damaged."""
    if not entry.is_dir():
        return None
    try:
        meta = read_record(_Meta, entry / "meta.json")
        arrays = {
            name: load_npy(entry / f"{name}.npy", "it is made again") for name in ("lengths", "episodes")
        }
        expected = {name: (dtype, (meta.rows, *shape)) for name, (dtype, shape) in _kinds(spec).items()}
        for name, (dtype, shape) in expected.items():
            arrays[name] = load_npy(entry / f"{name}.npy", "it is made again")
            if arrays[name].dtype != dtype or arrays[name].shape != shape:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        episodes, lengths = arrays["episodes"], arrays["lengths"]
        int_vectors = all(a.dtype == np.int64 and a.ndim == 1 for a in (episodes, lengths))
        if int_vectors and len(episodes) == len(lengths) and lengths.sum() == meta.rows:
            return meta, arrays
    except (UserError, ValueError) as error:
        log.debug("%s", error)
    log.warning("the cached latent actions %s are damaged; computing them again", entry.name)
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
