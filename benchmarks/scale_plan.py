"""Plan the labeling of a large dataset from unit costs that are measured on this machine.

Decoding (one core, H.264 and JPEG), encoding (all cores, the functions of `latentact label`) and bytes per
frame are measured on generated video; the plan multiplies them. Frames per second of one GPU are an input,
not measured. The cost of LAPA's latent pretraining (8 H100 for 34 hours, its README) is shown for comparison.

    python benchmarks/scale_plan.py [--frames 1e8] [--gpu-frames-per-s 1000] [--gpus 8] [--lam FOLDER]
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from latentact.data.cache import DataConfig
from latentact.data.stream import FrameStream
from latentact.labeling.episode import encode_clip, encoders
from latentact.labeling.precision import apply_precision
from latentact.lams.contract import LatentActionModel, load_lam
from latentact.lams.models.laq import LaqConfig

LAPA_GPU_HOURS = 8 * 34
FPS = 30


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Unit costs."""

    video_fps: float
    """Frames per second that one core decodes from H.264 and resizes."""
    video_bytes: float
    """Bytes of a frame in it."""
    jpeg_fps: float
    """Frames per second that one core decodes from JPEG."""
    jpeg_bytes: float
    encode_fps: float
    """Frames per second that this machine encodes."""
    label_bytes: int
    """Bytes of the labels of a frame."""


def images(count: int, side: int) -> Iterator[np.ndarray]:
    """Yield a moving object before a still, textured background, with the noise of a camera."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (side // 8 + 1, side // 8 + 1, 3), np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)).astype(
        np.int16
    )
    for i in range(count):
        image = ground + rng.normal(0, 2, ground.shape).astype(np.int16)
        x, y = int(side * (0.4 + 0.3 * np.sin(i / 9))), int(side * (0.4 + 0.3 * np.cos(i / 7)))
        image[y : y + side // 5, x : x + side // 5] = (230, 190, 60)
        yield image.clip(0, 255).astype(np.uint8)


def measure(model: LatentActionModel, precision: str, side: int, count: int, batches: int) -> Costs:
    """Return the unit costs of a model on generated video.

    Args:
        model: in evaluation mode.
        precision: fp32, bf16 or int8.
        side: height and width of the video.
        count: frames to decode.
        batches: batches to encode, per core.
    """
    with TemporaryDirectory() as root:
        path, size = Path(root) / "video.mp4", model.spec.resolution
        jpegs = []
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", FPS)
            stream.pix_fmt, stream.width, stream.height = "yuv420p", side, side
            for image in images(count, side):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                buffer = io.BytesIO()
                Image.fromarray(image).resize((size, size)).save(buffer, "jpeg", quality=95)
                jpegs.append(buffer.getvalue())
            container.mux(stream.encode())
        data = FrameStream(
            DataConfig(path=str(path), resolution=size, resize=model.spec.resize, cache_dir=root)
        )
        begun, frames = time.perf_counter(), []
        for _, chunks in data.episodes([0], workers=1):
            frames += [chunk.frames for chunk in chunks]
        video_s = time.perf_counter() - begun
        begun = time.perf_counter()
        for jpeg in jpegs:
            np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        jpeg_s = time.perf_counter() - begun
        k, d, codes = model.spec.tokens, model.spec.token_dim, model.spec.codebook_size is not None
        return Costs(
            video_fps=count / video_s,
            video_bytes=path.stat().st_size / count,
            jpeg_fps=count / jpeg_s,
            jpeg_bytes=sum(map(len, jpegs)) / count,
            encode_fps=encoding(model, precision, np.concatenate(frames), batches),
            label_bytes=2 * 4 * k * d + 8 * k * codes + 1,
        )


def encoding(model: LatentActionModel, precision: str, frames: np.ndarray, batches: int) -> float:
    """Return the number of frames per second that all cores encode, each a batch of its own."""
    quick, length = apply_precision(model, precision), 9
    clips = np.stack([frames[i : i + length] for i in range(0, len(frames) - length, length)])
    clip = torch.from_numpy(clips[:4]).permute(0, 1, 4, 2, 3)

    def encode(_: int) -> None:
        encode_clip(quick, clip, precision)

    with encoders("cpu") as (pool, _):
        threads = pool._max_workers if isinstance(pool, ThreadPoolExecutor) else 1
        list(pool.map(encode, range(threads)))
        begun = time.perf_counter()
        list(pool.map(encode, range(threads * batches)))
        return threads * batches * len(clip) * (length - 1) / (time.perf_counter() - begun)


def plan(costs: Costs, frames: float, shard_mb: float, gpu_fps: float, gpus: int) -> str:
    """Return the plan as text."""
    shard_frames = shard_mb * 1e6 / costs.jpeg_bytes
    gpu_hours = frames / gpu_fps / 3600
    decode_hours = frames / costs.jpeg_fps / 3600
    rows = [
        ("video", f"{frames / FPS / 3600:,.0f} h at {FPS} frames/s"),
        ("storage of H.264 video", f"{frames * costs.video_bytes / 1e12:.2f} TB"),
        ("storage of JPEG shards", f"{frames * costs.jpeg_bytes / 1e12:.2f} TB"),
        ("shards", f"{frames / shard_frames:,.0f} of {shard_mb:g} MB, {shard_frames:,.0f} frames each"),
        ("video to shards", f"{frames / costs.video_fps / 3600:,.0f} core-hours of decoding"),
        (
            "reading shards",
            f"{decode_hours:,.0f} core-hours; {gpu_fps / costs.jpeg_fps:.1f} cores feed a GPU",
        ),
        (
            "labels",
            f"{frames * costs.label_bytes / 1e9:,.0f} GB; three times that until the command has ended",
        ),
        ("encoding on machines like this", f"{frames / costs.encode_fps / 3600:,.0f} machine-hours"),
        (f"encoding at {gpu_fps:g} frames/s per GPU", f"{gpu_hours:,.1f} GPU-hours"),
        (f"the same with {gpus} GPUs", f"{gpu_hours / gpus:,.1f} h"),
        ("LAPA's latent pretraining, for scale", f"{LAPA_GPU_HOURS} H100-hours"),
        ("GPU-hours of labels over that", f"{gpu_hours / LAPA_GPU_HOURS:.2f}"),
    ]
    return "\n".join(["| what | plan |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)])


def main() -> None:
    """Print unit costs and plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=float, default=1e8)
    parser.add_argument("--shard-mb", type=float, default=500)
    parser.add_argument("--gpu-frames-per-s", type=float, default=1000)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--lam", default="", help="folder of a LAM; empty: LAQ of the published size")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "int8"])
    parser.add_argument("--side", type=int, default=256, help="height and width of the video")
    parser.add_argument("--count", type=int, default=600, help="frames to measure on")
    parser.add_argument("--batches", type=int, default=2, help="batches to encode, per core")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = load_lam(args.lam) if args.lam else LaqConfig().build().eval()
    costs = measure(model, args.precision, args.side, args.count, args.batches)
    cores, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"measured on {cores} cores, load {load:.1f}; {model.spec.model} in {args.precision}\n")
    print("| unit | cost |\n| --- | --- |")
    print(f"| decode H.264, {args.side} pixels | {costs.video_fps:,.0f} frames/s per core |")
    print(f"| decode JPEG, {model.spec.resolution} pixels | {costs.jpeg_fps:,.0f} frames/s per core |")
    print(f"| encode | {costs.encode_fps:,.2f} frames/s of this machine |")
    print(f"| bytes per frame | H.264 {costs.video_bytes:,.0f}, JPEG {costs.jpeg_bytes:,.0f} |")
    print(f"| bytes of labels per frame | {costs.label_bytes:,} |\n")
    print(plan(costs, args.frames, args.shard_mb, args.gpu_frames_per_s, args.gpus))


if __name__ == "__main__":
    main()
