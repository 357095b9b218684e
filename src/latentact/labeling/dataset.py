"""The latent actions of every row of a dataset, computed once and cached.

Work is split into units, each written as one file: a killed run resumes with the missing units, and an engine
(`latentact.labeling.engines`) distributes units over processes. Then the files are joined. Results are
cached under a key of frames, weights and gap.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from contextlib import ExitStack
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
from latentact.errors import UserError, require_one_of
from latentact.io.arrays import load_npy
from latentact.io.atomic import atomic_dir, atomic_write, write_json
from latentact.io.records import Record, read_record
from latentact.io.tensors import load_about, load_tensors, to_arrays
from latentact.labeling.engines import local, torchrun
from latentact.labeling.precision import PRECISIONS, apply_precision, select_precision
from latentact.labeling.units import Engine, Job, ProcessRank, states_of, units_of
from latentact.lams.contract import LatentActionModel
from latentact.progress import duration
from latentact.types import LatentActionSpec

log = logging.getLogger(__name__)

_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class DatasetLatents(LatentSequence):
    """Latent actions of every frame of the readable episodes of a dataset, memory-mapped."""

    key: str
    """Content key of the frames."""
    frame_indices: Int64[np.ndarray, " n"]
    """Row of each frame within its episode in the data."""
    episodes: Int64[np.ndarray, " e"]
    """Index of each episode in the data."""
    lengths: Int64[np.ndarray, " e"]
    """Frames of each episode."""
    unreadable: dict[str, str]
    """Unreadable episodes: name -> reason."""
    precision: str
    """fp32, bf16 or int8."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Options of encoding; they affect speed, and results only within rounding.

    Raises:
        UserError: a value is unknown or too small.
    """

    batch_size: int = 256
    """Transitions encoded together."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    precision: str = "fp32"
    """fp32; bf16 (faster, rounding differences); int8 (fastest, coarsest); or auto: the fastest that the
    device supports natively and that preserves 99 % of the codes of the data's first transitions."""
    workers: int = 0
    """Decoding threads; 0: one per core."""
    cache_dir: str = ""
    """Folder of the cache; empty: $LATENTACT_CACHE, or ~/.cache/latentact."""
    overwrite: bool = False
    """Whether to ignore cached results."""
    process: ProcessRank = field(default_factory=ProcessRank.from_environment)
    """Rank of this process among several."""

    def __post_init__(self) -> None:
        """Validate the options."""
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}.")
        if self.workers < 0:
            raise UserError(f"--num-workers must be at least 0, got {self.workers}.")
        require_one_of("--precision", self.precision, PRECISIONS)
        if self.precision == "int8" and not supports_int8(self.device):
            raise UserError(
                f"--precision must not be int8 on this {self.device}, which has no VNNI. Use auto."
            )


def encode_dataset(
    model: LatentActionModel,
    stream: FrameStream,
    gap: int,
    options: EncodeOptions,
    engine: Engine | None = None,
) -> DatasetLatents | None:
    """Return the latent actions of a dataset, from the cache if possible.

    Args:
        model: in evaluation mode, on the device.
        stream: the data.
        gap: frames between the two frames of a transition.
        options: how to encode.
        engine: engine that encodes the units; None: this process, or with several ranks each its own units.

    Returns:
        The latent actions in the first process, which waits for the others and joins the files; None in the
        others.

    Raises:
        UserError: no episode is long enough for a transition, none can be read, the disk is full, or another
            process has stopped.
    """
    if max(stream.lengths) <= gap:
        raise UserError(
            f"episodes of {stream.path} must have at least {gap + 1} frames for a window (frame gap "
            f"{gap}), got {max(stream.lengths)} in the longest of {len(stream.lengths)}. Use a smaller gap "
            f"or longer videos."
        )
    states = states_of(model, stream)
    if options.precision == "auto":
        fastest = select_precision(model, stream, gap, options.device, options.workers, states)
        log.info("computing in %s", fastest)
        options = replace(options, precision=fastest)
    process = options.process
    engine = engine or (torchrun.encode if process.world_size > 1 else local.encode)
    folder = cache_folder(options.cache_dir) / "tokens"
    spec = replace(model.spec, frame_gap=gap, frame_gap_s=gap / stream.fps, fps=stream.fps)
    key = _key(model, stream, gap, options.precision)
    units = units_of(stream.lengths, stream.groups, options.batch_size)
    entry, parts = folder / key, folder / f"{_draft_name(key, stream, options)}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if process.rank == 0:
            stack.enter_context(FileLock(writable(folder / f"{key}.lock")))
        found = None if options.overwrite else _read(entry, spec)
        if found is None:
            job = Job(
                model=apply_precision(model, options.precision),
                stream=stream,
                gap=gap,
                batch_size=options.batch_size,
                device=options.device,
                precision=options.precision,
                workers=options.workers,
                states=states,
                parts=parts,
                units=units,
            )
            parts.mkdir(exist_ok=True)
            begun, frames = time.monotonic(), job.frames(job.missing())
            engine(job, process)
            if process.rank == 0:
                _report(frames, stream.fps, time.monotonic() - begun)
                _join(job, entry, spec)
                found = _read(entry, spec)
            elif entry.is_dir() and not options.overwrite:
                shutil.rmtree(parts, ignore_errors=True)  # the first process has joined all parts
        else:
            log.info("the latent actions of %s are cached", stream.path)
        mine = found if process.rank == 0 else None
        encoded = _encoded(*mine, entry, stream, spec, options.precision) if mine else None
    if encoded and not encoded.valid.any():
        raise UserError(
            f"{stream.path} must have frames {gap / stream.fps:g} s apart (frame gap {gap}), got none. "
            f"Check their times with latentact check-data."
        )
    if encoded and encoded.unreadable:
        if stream.strict:
            raise UserError(unreadable_message(encoded.unreadable))
        log.warning("%s: skipped %s", stream.path, unreadable_message(encoded.unreadable))
    return encoded


def _key(model: LatentActionModel, stream: FrameStream, gap: int, precision: str) -> str:
    """Return the key of a cache entry: a digest of everything that affects the latent actions."""
    settings = to_dict(model.config)  # some, like a window, change results for the same weights
    identity = [_VERSION, stream.key, model.spec.weights, settings, gap, precision]
    if not stream.usable.all():
        identity.append(blake2b(np.packbits(stream.usable).tobytes()))
    return blake2b(json.dumps(identity).encode())


def _draft_name(key: str, stream: FrameStream, options: EncodeOptions) -> str:
    """Return the name of an unfinished entry: its key, and what affects the division into units."""
    parts = [key, str(options.batch_size), options.device.partition(":")[0]]
    if stream.groups:
        parts.append(blake2b(json.dumps(stream.groups).encode())[:8])
    return ".".join(parts) + (".again" if options.overwrite else "")


def _report(frames: int, fps: float, seconds: float) -> None:
    """Log the time spent per hour of encoded video."""
    hours = frames / fps / 3600
    if hours:
        cost = seconds / hours
        log.info("%.4g h of video in %s: %s per hour of video", hours, duration(seconds), duration(cost))


def _join(job: Job, entry: Path, spec: LatentActionSpec) -> None:
    """Join the files of all units, in order."""
    paths, source = [job.part(unit) for unit in range(len(job.units))], job.stream.source
    kinds = _kinds(spec)
    lengths, episodes, unreadable = [], [], {}
    for path in paths:
        try:
            part = to_arrays(load_tensors(path, ("lengths", "episodes")), path)
            lengths.append(part["lengths"])
            episodes.append(part["episodes"])
            unreadable |= load_about(path)
        except (UserError, TypeError, KeyError) as error:
            path.unlink(missing_ok=True)
            raise UserError(f"{path} was damaged and has been removed. Re-run the command.") from error
    broken = {source.episodes[int(number)].label: why for number, why in unreadable.items()}
    rows = int(sum(each.sum() for each in lengths))
    if not rows:
        shutil.rmtree(job.parts)
        raise UserError(f"no episode is readable: {unreadable_message({**source.unreadable, **broken})}")
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
                part = to_arrays(load_tensors(path), path)
                for name, (dtype, shape) in kinds.items():
                    none = np.zeros((len(part["valid"]), *shape), dtype)
                    files[name].write(part.get(name, none).astype(dtype).tobytes())
        write_json(
            folder / "meta.json",
            {"spec": asdict(spec), "camera": source.camera, "rows": rows, "unreadable": broken},
        )
    shutil.rmtree(job.parts)


class _LatentsRecord(Record):
    """`meta.json` of a cache entry."""

    rows: int
    unreadable: dict[str, str]


def _read(entry: Path, spec: LatentActionSpec) -> tuple[_LatentsRecord, dict[str, np.ndarray]] | None:
    """Return a cache entry; None if it is missing or damaged."""
    if not entry.is_dir():
        return None
    try:
        meta = read_record(_LatentsRecord, entry / "meta.json")
        arrays = {
            name: load_npy(entry / f"{name}.npy", "it is computed again") for name in ("lengths", "episodes")
        }
        expected = {name: (dtype, (meta.rows, *shape)) for name, (dtype, shape) in _kinds(spec).items()}
        for name, (dtype, shape) in expected.items():
            arrays[name] = load_npy(entry / f"{name}.npy", "it is computed again")
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
    meta: _LatentsRecord,
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
