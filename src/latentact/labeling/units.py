"""The units of work of labeling: episodes that are encoded together and written as one file.

A unit is one shard of the data where its format has shards, else one episode, or as many short ones as fill
a batch. It depends only on the data and the batch size, and batches never span two units, so that
results do not depend on the engine, the process or the number of processes that encode it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentact.data.stream import FrameStream
from latentact.errors import UserError
from latentact.labeling.episode import EpisodeEncoder, encoders
from latentact.labeling.precision import States
from latentact.lams.contract import LatentActionModel, states_message
from latentact.progress import Progress


@dataclass(frozen=True, kw_only=True)
class ProcessRank:
    """Rank of this process among several."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""

    @classmethod
    def from_environment(cls, launched: bool = False) -> ProcessRank:
        """Return the rank in torchrun's environment variables; a single process without them.

        Args:
            launched: whether a launcher is required, torchrun or srun.

        Raises:
            UserError: a variable is not an integer, the rank is not less than the number of processes, or
                a required launcher is missing.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if launched and "RANK" not in os.environ:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
            if names[0] not in os.environ:
                raise UserError(
                    "--engine torchrun must be started by torchrun or srun, got neither. Use: torchrun "
                    "--nproc-per-node 2 -m latentact COMMAND ..."
                )
        try:
            rank, world, local = (
                int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True)
            )
        except ValueError as error:
            raise UserError(f"{', '.join(names)} must be integers. Use torchrun or srun.") from error
        if not 0 <= rank < world:
            raise UserError(
                f"{names[0]} must be between 0 and {names[1]} - 1 = {world - 1}, got {rank}. Use torchrun."
            )
        return cls(rank=rank, world_size=world, local_rank=local)

    def device(self, name: str) -> str:
        """Return the device of this process: with `cuda`, processes of a machine take one GPU each."""
        if name != "cuda" or self.world_size == 1:
            return name
        import torch

        return f"cuda:{self.local_rank % max(1, torch.cuda.device_count())}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Encoding of a dataset, unit by unit."""

    model: LatentActionModel
    """Model in evaluation mode, on the device, in the precision."""
    stream: FrameStream
    gap: int
    """Frames between the two frames of a transition."""
    batch_size: int
    device: str
    precision: str
    """fp32, bf16 or int8."""
    workers: int
    """Decoding threads; 0: one per core."""
    states: States | None
    parts: Path
    """Folder with the files of finished units."""
    units: Sequence[Sequence[int]]
    """Episodes of each unit."""

    def part(self, unit: int) -> Path:
        """Return the file of a unit."""
        return self.parts / f"{unit:08d}.safetensors"

    def missing(self) -> list[int]:
        """Return the units without a file."""
        there = {entry.name for entry in os.scandir(self.parts)}
        return [unit for unit in range(len(self.units)) if self.part(unit).name not in there]

    def frames(self, units: Sequence[int]) -> int:
        """Return the number of frames of units; an estimate if frames are resampled."""
        return sum(self.stream.lengths[number] for unit in units for number in self.units[unit])


type Engine = Callable[[Job, ProcessRank], None]
"""Writes this process's missing files of a job; in the first process, returns when all exist.

Raises:
    UserError: files are missing that no process will write.
"""


def units_of(lengths: Sequence[int], groups: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Return the episodes of each unit.

    Args:
        lengths: frames of each episode.
        groups: first episode, and last + 1, of each shard; empty for data that is not in shards.
        batch_size: maximum number of frames in a unit of several episodes.
    """
    if groups:
        return [[*range(first, stop)] for first, stop in groups]
    units, size = [], batch_size
    for number, length in enumerate(lengths):
        if size + length > batch_size:
            units.append([])
            size = 0
        units[-1].append(number)
        size += length
    return units


def states_of(model: LatentActionModel, stream: FrameStream) -> States | None:
    """Return a function from rows to robot states; None for a model that does not use them.

    Raises:
        UserError: the model uses states that the data does not have.
    """
    if not model.state_size:
        return None
    column = stream.state
    size = 0 if column is None else column.shape[1]
    if column is None or size != model.state_size:
        raise UserError(states_message(model.spec, model.state_size, size, str(stream.path)))

    def at(number: int, frame_indices: Sequence[int]) -> np.ndarray:
        return column[stream.source.first_rows[number] + np.asarray(frame_indices)]

    return at


def encode_units(job: Job, units: Sequence[int], progress: Progress) -> None:
    """Encode units and write the file of each atomically; decoding, encoding and writing overlap."""
    numbers = [number for unit in units for number in job.units[unit]]
    with (
        closing(job.stream.episodes(numbers, job.workers)) as episodes,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        encoders(job.device) as (pool, most),
    ):
        waiting: deque[Future[None]] = deque()
        for unit in units:
            run = EpisodeEncoder(
                job.model,
                job.gap,
                pool,
                batch_size=job.batch_size,
                device=job.device,
                precision=job.precision,
                states=job.states,
                transitions=job.stream.transitions,
            )
            for _ in job.units[unit]:
                number, chunks = next(episodes)
                for future in run.episode(number, chunks, progress):
                    waiting.append(future)
                    if len(waiting) > most:
                        waiting.popleft().result()
            waiting += run.end(writer, job.part(unit))
        for future in waiting:
            future.result()
