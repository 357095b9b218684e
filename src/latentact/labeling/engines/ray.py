"""Encode in a pool of Ray actors, on this machine or on a running cluster.

Rows of the Ray dataset are unit indices. Frames and results never pass through Ray: actors read the data
and write the files of the units, so that a unit can be repeated after an actor has died.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from latentact.config import OneOf, Workers
from latentact.data.cache import DataConfig, cache_folder
from latentact.data.locate import absolute_name
from latentact.data.stream import FrameStream
from latentact.device import require_device
from latentact.errors import UserError, missing_extra, require_one_of
from latentact.labeling.precision import apply_precision
from latentact.labeling.units import Job, ProcessRank, encode_units, states_of, units_of
from latentact.lams.contract import load_lam
from latentact.progress import Progress

log = logging.getLogger(__name__)

_BATCHES = 8
"""Batches of a task: decoding runs ahead within a task, not from one to the next."""
_TRIES = 5
"""Maximum attempts for units whose actors die."""
_PATIENCE_S = 30.0
"""Seconds to wait for free processors: those of a killed command are not freed at once."""
_OBJECT_STORE_BYTES = 200 << 20


ENGINES = ("local", "torchrun", "ray")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which processes encode."""

    engine: Annotated[str, OneOf(ENGINES)] = "local"
    """local: this process; torchrun: the processes that torchrun or srun has started; ray: actors of a Ray
    cluster. All write the same bytes, and each resumes the work of another."""
    ray_address: str = ""
    """Address of a running Ray cluster, or auto; empty: start one on this machine."""
    ray_actors: Workers = 0
    """Ray actors, each with a CPU core or, with `device` cuda, a GPU; 0: as many as are free."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("--engine", self.engine, ENGINES)
        if self.engine != "ray" and (self.ray_address or self.ray_actors):
            raise UserError(f"--ray-address and --ray-actors need --engine ray, got {self.engine}. Add it.")

    def loads_on(self, device: str, precision: str) -> str:
        """Return the device of this process: with Ray only actors encode; the trial of `auto` runs here."""
        return "cpu" if self.engine == "ray" and precision != "auto" else device

    def build(self, process: ProcessRank, lam: str, data: DataConfig) -> Ray | None:
        """Return the engine; None: this process, or those of the launcher.

        Raises:
            UserError: several processes were started for Ray.
        """
        if self.engine != "ray":
            return None
        if process.world_size > 1:
            raise UserError(
                f"--engine ray must be started once, got {process.world_size} processes. Use --engine "
                f"torchrun."
            )
        return Ray(lam=lam, data=data, address=self.ray_address, actors=self.ray_actors)


@dataclass(frozen=True, kw_only=True)
class Ray:
    """The engine; see `Engine`.

    Raises:
        UserError: Ray is not installed, no cluster runs at the address, it has too few free processors, the
            same units kill their actors repeatedly, or nodes do not share files.
    """

    lam: str
    """Folder or hub id of the latent action model."""
    data: DataConfig
    """The data."""
    address: str
    """Address of a running cluster, or auto; empty: start one on this machine."""
    actors: int
    """Number of actors; 0: one per free GPU or CPU core."""

    def __call__(self, job: Job, process: ProcessRank) -> None:
        """Write all missing files."""
        missing = job.missing()
        for file in job.parts.glob("*.tries"):
            file.unlink()
        if missing:
            with _cluster(self.address, self.actors) as ray:
                self._encode(ray, job, missing)
        if job.missing():
            raise _not_shared(job.parts)

    def _encode(self, ray: Any, job: Job, missing: list[int]) -> None:
        kind = "GPU" if job.device == "cuda" else "CPU"
        tasks = _tasks(job, missing, actors := self._free(ray, kind))
        lam = Path(self.lam).expanduser()
        recipe = {
            "lam": str(lam.absolute()) if lam.exists() else self.lam,
            "data": replace(
                self.data,
                path=absolute_name(self.data.path),
                cache_dir=str(cache_folder(self.data.cache_dir).absolute()),
            ),
            "key": job.stream.key,
            "gap": job.gap,
            "batch_size": job.batch_size,
            "device": job.device,
            "precision": job.precision,
            "workers": job.workers or (0 if kind == "GPU" else 1),
            "parts": str(job.parts.absolute()),
        }
        items = [{"units": json.dumps(task)} for task in tasks]
        encoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            RayActor,
            fn_constructor_args=(recipe,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(tasks))),
            **{f"num_{kind.lower()}s": 1},
        )
        rows = iter(encoded.iter_rows())
        total = job.frames(range(len(job.units)))
        log.info("starting %d Ray actors", min(actors, len(tasks)))
        done = total - job.frames(missing)
        done += _frames(next(rows))  # actors start before that, so that the rate is that of encoding
        with Progress("encoding", total, "frames", done=done) as progress:
            for row in rows:
                progress.advance(_frames(row))

    def _free(self, ray: Any, kind: str) -> int:
        """Return the number of actors for the free processors of a kind."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            free, most = (
                int(resources().get(kind, 0))
                for resources in (ray.available_resources, ray.cluster_resources)
            )
            needed = self.actors or max(1, free)
            if needed <= free:
                return needed
            if needed > most or time.monotonic() > deadline:
                raise UserError(
                    f"the Ray cluster must have as many free {kind}s as actors ({needed}), got {free} of "
                    f"{most}. Use fewer --ray-actors, or wait until other jobs have ended."
                )
            time.sleep(0.5)


class RayActor:
    """Encodes units; loads the model once.

    Args:
        recipe: arguments of a `Job`, as values that Ray can serialize.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        self._recipe, self._parts = recipe, Path(recipe["parts"])
        self._job: Job | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the files of the units of a task; a user error is returned."""
        units, frames, text = json.loads(str(batch["units"][0])), 0, ""
        tries = self._parts / f"{units[0]:08d}.tries"
        try:
            if not self._parts.is_dir():
                raise _not_shared(self._parts)
            with tries.open("ab") as file:
                if file.tell() == _TRIES:
                    raise UserError(
                        f"{_TRIES} Ray actors have died while they encoded the same episodes, perhaps for "
                        f"lack of memory. Use fewer --ray-actors or a smaller --batch-size; finished work "
                        f"is kept."
                    )
                file.write(b".")
            self._job = self._job or _job(**self._recipe)
            frames = self._job.frames(units)
            encode_units(self._job, units, Progress("encoding", frames, "frames", every_s=float("inf")))
            tries.unlink(missing_ok=True)
        except UserError as error:
            text = str(error)
        return {"frames": np.array([frames]), "error": np.array([text])}


def _not_shared(parts: Path) -> UserError:
    return UserError(
        f"{parts} must be on a file system that all nodes share, got a node without it. Set "
        f"LATENTACT_CACHE to a folder that they share."
    )


def _frames(row: dict[str, Any]) -> int:
    """Return the number of frames of a finished task."""
    if row["error"]:
        raise UserError(row["error"])
    return int(row["frames"])


def _job(
    lam: str,
    data: DataConfig,
    key: str,
    gap: int,
    batch_size: int,
    device: str,
    precision: str,
    workers: int,
    parts: str,
) -> Job:
    """Load model and data on the node of an actor."""
    require_device(device)
    if device == "cpu":
        torch.set_num_threads(1)  # an actor has one core
    model, stream = load_lam(lam, device), FrameStream(data)
    if stream.key != key:
        raise UserError(
            f"{data.path} must be the same on all nodes, got other data on {platform.node()}. Copy it again."
        )
    return Job(
        model=apply_precision(model, precision),
        stream=stream,
        gap=gap,
        batch_size=batch_size,
        device=device,
        precision=precision,
        workers=workers,
        states=states_of(model, stream),
        parts=Path(parts),
        units=units_of(stream.lengths, stream.groups, batch_size),
    )


def _tasks(job: Job, missing: list[int], actors: int) -> list[list[int]]:
    """Group missing units into tasks of several batches; at least four tasks per actor."""
    most = min(_BATCHES * job.batch_size, job.frames(missing) // (4 * actors))
    tasks, size = [], most
    for unit in missing:
        frames = job.frames([unit])
        if not tasks or size + frames > most:
            tasks.append([])
            size = 0
        tasks[-1].append(unit)
        size += frames
    return tasks


@contextmanager
def _cluster(address: str, actors: int) -> Generator[Any]:
    """Yield Ray, connected to a cluster; one that is started here is stopped at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray warns about how Ray Data starts actors, which users cannot change.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise missing_extra("ray", "scale") from error
    own: dict[str, Any] = {
        "num_cpus": actors or None,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    connected = ray.is_initialized()
    if not connected:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if ":" in address:  # Ray itself would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
            ray.init(address=address or "local", **quiet, **({} if address else own))
        except (OSError, ValueError, RuntimeError, RayError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            where = f"at {address}" if address else "on this machine"
            raise UserError(
                f"a Ray cluster must run {where}, got {type(error).__name__} ({reason}). Start it with "
                f"ray start --head, set RAY_AUTH_MODE=token if it needs a token, or leave out --ray-address."
            ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        if not connected:
            ray.shutdown()
