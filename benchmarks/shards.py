"""Benchmark shards: frames at random places through the store, against decoding the same bytes in memory.

`store` reads byte ranges of the tars and decodes them, one batch of pairs at a time; `plain` decodes the same
images from memory with PIL. Both use one thread and are timed in CPU seconds, alternately. Then the memory
that the index of a large dataset takes is measured in a process of its own.

    python benchmarks/shards.py [--frames 6400] [--side 128] [--batches 40] [--rows 2000000]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from latentact.data.cache import DataConfig, open_store
from latentact.data.tars import file_sha256
from latentact.stages.shard import ShardConfig, run

PAIRS = 64


def make(root: Path, frames: int, side: int) -> Path:
    """Write shards of smooth moving images."""
    rng = np.random.default_rng(0)
    ground = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((2 * side, side))
    obs = np.stack([np.asarray(ground)[:, t % side : t % side + side] for t in range(frames)])
    np.savez(root / "data.npz", obs=obs, done=np.arange(frames) % 100 == 99, fps=10)
    run(
        ShardConfig(data=DataConfig(path=str(root / "data.npz")), out=str(root / "shards"), shard_size_mb=8.0)
    )
    return root / "shards"


def measure_reading(folder: Path, batches: int) -> None:
    """Print pairs per second of both ways."""
    torch.set_num_threads(1)
    store = open_store(DataConfig(path=str(folder), resolution=0))
    images = []
    for tar in sorted(folder.glob("*.tar")):
        data, index = tar.read_bytes(), json.loads(tar.with_suffix(".json").read_text())
        for clip in index["clips"]:
            images += [data[o : o + n] for o, n in zip(clip["offsets"], clip["sizes"], strict=True)]
    ratios, rates = [], []
    for batch in range(batches):
        rows = np.random.default_rng(batch).integers(store.num_frames - 1, size=PAIRS)
        pairs = np.stack([rows, rows + 1], 1)
        begin = time.process_time()
        shown = store.frames[pairs]
        middle = time.process_time()
        plain = np.stack([np.asarray(Image.open(io.BytesIO(images[row]))) for row in pairs.reshape(-1)])
        end = time.process_time()
        assert np.array_equal(plain.reshape(shown.shape), shown)
        ratios.append((end - middle) / (middle - begin))
        rates.append(PAIRS / (middle - begin))
    ratio = statistics.median(ratios)
    print(f"store {statistics.median(rates):.0f} pairs/s, of what plain decoding reaches: ratio {ratio:.2f}")


def measure_memory(folder: Path, rows: int) -> None:
    """Print the growth of memory per frame while a store of many frames is opened."""
    tar = next(iter(sorted(folder.glob("*.tar"))))
    index = json.loads(tar.with_suffix(".json").read_text())
    per_tar = sum(clip["count"] for clip in index["clips"])
    large = folder.with_name("large")
    large.mkdir()
    count = max(1, round(rows / per_tar))
    for number in range(count):  # hard links, which share their bytes
        os.link(tar, large / f"shard-{number:06d}.tar")
        (large / f"shard-{number:06d}.json").write_text(json.dumps(index))
    assert file_sha256(tar) == index["sha256"]
    done = subprocess.run(
        [sys.executable, __file__, "--open", str(large)], capture_output=True, text=True, check=True
    )
    print(f"index of {count * per_tar} frames: {done.stdout.strip()}")


def memory(name: str) -> int:
    """Return a figure of this process in bytes: VmRSS, what it holds now, or VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def open_large(folder: Path) -> None:
    """Open a store, and print what that took."""
    before = memory("VmRSS")
    begin = time.process_time()
    store = open_store(DataConfig(path=str(folder), resolution=64))
    taken = (memory("VmHWM") - before) / store.num_frames
    print(f"{taken:.0f} bytes per frame at its peak, {time.process_time() - begin:.1f} s of CPU")


def main() -> None:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=6400)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--open", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.open:
        open_large(Path(flags.open))
        return
    with TemporaryDirectory() as root:
        os.environ["LATENTACT_CACHE"] = f"{root}/cache"
        folder = make(Path(root), flags.frames, flags.side)
        measure_reading(folder, flags.batches)
        measure_memory(folder, flags.rows)


if __name__ == "__main__":
    main()
