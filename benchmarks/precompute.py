"""Benchmark `latentact precompute`: the pipeline against its stages, and peak memory for 100,000 rows.

`decode` only decodes, `encode` encodes decoded frames, `pipeline` does both and writes; all three use the
functions and threads of the command. The ratio is the pipeline's rate over that of the slower stage. Then the
column of a dataset of many rows is added in a separate process, whose peak memory is printed.

    python benchmarks/precompute.py [--frames 3000] [--rows 100000] [--repeats 3] [--device cpu]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch

from latentact.data.cache import DataConfig, open_store
from latentact.data.convert import convert
from latentact.data.stream import FrameStream
from latentact.labeling.dataset import EncodeOptions, encode_dataset
from latentact.lams.models.lapo import LapoConfig

FPS, EPISODE, SIDE = 30, 500, 192


def write_video(path: Path, seed: int, frames: int = EPISODE, side: int = SIDE) -> None:
    """Write a video of a bright square that moves over noise."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 120, (side, side, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            "libx264", FPS, options={"preset": "ultrafast", "g": "10", "bf": "0"}
        )
        stream.pix_fmt, stream.width, stream.height = "yuv420p", side, side
        for i in range(frames):
            image = ground.copy()
            x, y = int(side * (0.4 + 0.3 * np.sin(i / 9))), int(side * (0.4 + 0.3 * np.cos(i / 7)))
            image[y : y + side // 6, x : x + side // 6] = (250, 200, 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def rates(frames: int, repeats: int, device: str) -> None:
    """Print frames per second of decoding, encoding and the pipeline."""
    torch.manual_seed(0)
    model = LapoConfig().build().eval().to(device)  # the published size: IMPALA x 4, 64x64 pixels
    found: dict[str, list[float]] = {"decode": [], "encode": [], "pipeline": []}
    for repeat in range(repeats):
        with TemporaryDirectory() as root:
            data = Path(root) / "videos"
            data.mkdir()
            for number in range(max(1, frames // EPISODE)):
                write_video(data / f"{number}.mp4", 1000 * repeat + number)
            config = DataConfig(path=str(data), resolution=model.spec.resolution, cache_dir=f"{root}/frames")
            stream = FrameStream(config)
            total = sum(stream.lengths)

            def encode(name: str, stream: FrameStream = stream, root: str = root) -> None:
                options = EncodeOptions(device=device, cache_dir=f"{root}/{name}")
                encode_dataset(model, stream, 3, options)

            found["decode"].append(total / seconds(lambda stream=stream: drain(stream)))
            found["pipeline"].append(total / seconds(lambda: encode("pipeline")))
            open_store(config)
            found["encode"].append(total / seconds(lambda: encode("encode")))
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = [
        p / min(d, e) for d, e, p in zip(found["decode"], found["encode"], found["pipeline"], strict=True)
    ]
    for name, rate in medians.items():
        print(f"{name:9s} {rate:9.1f} frames/s")
    print(f"pipeline / slower stage: {statistics.median(ratios):.3f} (median of {repeats}; target 0.9)")


def drain(stream: FrameStream) -> None:
    """Decode all frames and discard them."""
    for _, chunks in stream.episodes(range(len(stream.lengths))):
        for _ in chunks:
            pass


def seconds(work: Callable[[], None]) -> float:
    """Return the duration of a call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def memory(rows: int) -> None:
    """Print time and peak memory of adding the column to a dataset of many rows."""
    with TemporaryDirectory() as root:
        videos, data, out = (Path(root) / name for name in ("videos", "data", "out"))
        videos.mkdir()
        write_video(videos / "0000.mp4", 0, side=96)
        for number in range(1, rows // EPISODE):
            os.link(videos / "0000.mp4", videos / f"{number:04d}.mp4")
        stream = FrameStream(DataConfig(path=str(videos), resolution=32, cache_dir=f"{root}/cache"))
        convert(stream, data, list(range(len(stream.lengths))))
        small = {"backbone": "patch", "size": 32, "patch": 8, "idm_channels": (8,), "fdm_channels": (8,)}
        LapoConfig(**small).build().save_pretrained(f"{root}/lam")
        where = ("--dataset-root", data, "--lam-model-path", f"{root}/lam", "--output-dir", out)
        command = [sys.executable, "-m", "latentact", "precompute", *map(str, where)]
        begun = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "LATENTACT_CACHE": f"{root}/cache"})
        took = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        own = [file for file in out.rglob("*") if file.is_file() and file.stat().st_nlink == 1]
        size = sum(file.stat().st_size for file in own) / 1e6
        links = sum(1 for file in out.rglob("*.mp4") if file.stat().st_nlink > 1)
        print(f"column of {sum(stream.lengths)} rows: {took:.0f} s, peak memory {peak:.2f} GiB (target: 1.4)")
        print(f"written {size:.0f} MB; {links} videos linked, none copied")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.frames:
        rates(args.frames, args.repeats, args.device)
    if args.rows:
        memory(args.rows)


if __name__ == "__main__":
    main()
