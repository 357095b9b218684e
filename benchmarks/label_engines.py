"""Benchmark the Ray engine of `latentact label` against the local engine, after start-up.

Both label the same generated videos with LAPO of the published size, in turns, on all cores: Ray with one
actor per core. The rate is that of the second half of a run, without its last tenth, by the times at which
units were finished: then all actors work. CPU seconds of all processes, per 1,000 frames in that time, are
less sensitive to other load.

    python benchmarks/label_engines.py [--frames 12000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import psutil
import torch
from precompute import write_video

from latentact.data.cache import DataConfig
from latentact.data.stream import FrameStream
from latentact.labeling.dataset import EncodeOptions, encode_dataset
from latentact.labeling.engines import local
from latentact.labeling.engines.ray import Ray, _cluster
from latentact.labeling.units import Engine, Job, ProcessRank
from latentact.lams.contract import load_lam
from latentact.lams.models.lapo import LapoConfig

EPISODE = 100
BATCH = 64


def middle(job: Job) -> tuple[int, int]:
    """Return the numbers of finished units between which a run is measured."""
    return len(job.units) // 2, len(job.units) * 9 // 10


def rate(engine: Engine, config: DataConfig, lam: str, cache: str) -> tuple[float, float]:
    """Return frames per second, and CPU seconds per 1,000 frames, of the middle of a run."""
    found = (0.0, 0.0)

    def timed(job: Job, process: ProcessRank) -> None:
        nonlocal found
        ends: list[tuple[float, dict[int, float]]] = []  # time and CPU times at the start and at the end

        def watch() -> None:
            for count in middle(job):
                while len(job.units) - len(job.missing()) < count:
                    time.sleep(0.05)
                ends.append((time.monotonic(), cpu_seconds()))

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        engine(job, process)
        watcher.join()
        low, high = middle(job)
        frames = (high - low) * EPISODE
        (begun, cpu_begun), (ended, cpu_ended) = ends
        cpu = sum(seconds - cpu_begun.get(pid, 0) for pid, seconds in cpu_ended.items())
        found = frames / (ended - begun), 1000 * cpu / frames

    model, stream = load_lam(lam), FrameStream(config)
    encode_dataset(model, stream, 1, EncodeOptions(batch_size=BATCH, cache_dir=cache), timed)
    return found


def cpu_seconds() -> dict[int, float]:
    """Return the CPU time of this process and of all below it, by process id."""
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=12_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    torch.manual_seed(0)
    with TemporaryDirectory() as root, _cluster("", cores):
        (videos := Path(root) / "videos").mkdir()
        for number in range(max(1, args.frames // EPISODE)):
            write_video(videos / f"{number:04d}.mp4", number, EPISODE)
        lam = f"{root}/lam"
        LapoConfig().build().save_pretrained(lam)
        config = DataConfig(path=str(videos), resolution=64, cache_dir=f"{root}/frames")
        engines: dict[str, Engine] = {
            "local": local.encode,
            "ray": Ray(lam=lam, data=config, address="", actors=cores),
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for repeat in range(args.repeats):
            for name, engine in engines.items():
                rates[name].append(rate(engine, config, lam, f"{root}/{name}{repeat}"))
                fps, cpu = rates[name][-1]
                load = os.getloadavg()[0]
                print(f"{name:6s} {fps:7.1f} frames/s, {cpu:6.2f} CPU s per 1,000, load {load:.1f}")
    pairs = zip(rates["ray"], rates["local"], strict=True)
    ratios = [ray[0] / plain[0] for ray, plain in pairs]
    print(
        f"ray / local after start-up: {statistics.median(ratios):.3f} (median of {args.repeats}; target 0.9)"
    )


if __name__ == "__main__":
    main()
