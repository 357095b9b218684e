"""Small realistic inputs: videos with numbered frames, LeRobot datasets, a LAM."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TOP = "observation.images.top"
STATE, ACTION = "observation.state", "action"
HEIGHT, WIDTH = 32, 48
EPISODE = 20
"""Frame i of episode e carries the number 20 e + i."""


# --- frames


def numbered(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return a gray frame: 8 bits of a number along the top, red below on the left, blue on the right."""
    frame = np.full((height, width, 3), 96, np.uint8)
    for bit in range(8):
        frame[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 235 if number >> bit & 1 else 20
    frame[3 * height // 4 :, : width // 3] = (220, 30, 30)
    frame[3 * height // 4 :, -width // 3 :] = (30, 30, 220)
    return frame


def number(frame: np.ndarray) -> int:
    """Return the number that a frame [h, w, 3], values 0..255, carries."""
    height, width = frame.shape[:2]
    row = frame[height // 4 - 1 : height // 4 + 1]
    return sum(1 << bit for bit in range(8) if row[:, (2 * bit + 1) * width // 16].mean() > 128)


def numbers(frames: Iterable[np.ndarray]) -> list[int]:
    return [number(frame) for frame in frames]


def encoded(image: np.ndarray | Image.Image, kind: str = "png", **options: Any) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


# --- videos


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray] = 8,
    *,
    start: int = 0,
    fps: float = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    millis: Sequence[int] | None = None,
    color: tuple[int, int] = (2, 0),
    options: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> Path:
    """Write a video.

    Args:
        path: file; its ending names the container.
        frames: how many numbered frames, or the frames.
        start: number of the first.
        fps: rate; with `millis` only what the stream names.
        codec: FFmpeg's name.
        pix_fmt: likewise.
        millis: when each frame is shown.
        color: FFmpeg's numbers of the matrix and the range; (2, 0): the stream names none.
        options: of the encoder.
        container: of the container.
        size: height and width.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [numbered(start + i, *size) for i in range(frames)] if isinstance(frames, int) else frames
    quality = {"libx264": {"crf": "8", "g": "4"}, "mpeg4": {"q:v": "2", "g": "4"}}.get(codec, {})
    with av.open(str(path), "w", options=dict(container or {})) as out:
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = out.add_stream(codec, rate=rate, options={**quality, **(options or {})})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = color
        base = Fraction(1, 1000) if millis is not None else 1 / rate
        stream.codec_context.time_base = base
        for place, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = (place if millis is None else millis[place]), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def turn(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Write the display matrix (a b; c d) into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    data[place : place + 36] = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)
    return path


def trim(path: Path, *, keep_ms: int, skip: float = 0.0) -> Path:
    """Set the edit list of an mp4 to show `keep_ms` milliseconds starting at `skip` seconds."""
    data = bytearray(path.read_bytes())
    scale = struct.unpack_from(">I", data, data.find(b"mdhd") + 16)[0]
    place = data.find(b"elst") + 12
    begin = struct.unpack_from(">i", data, place + 4)[0]
    struct.pack_into(">Ii", data, place, keep_ms, begin + round(skip * scale))
    path.write_bytes(data)
    return path


def ffmpeg_frames(path: Path, stream: str = "0:v:0") -> np.ndarray | None:
    """Return the frames [n, h, w, 3] decoded by the FFmpeg command line; None if it is not installed."""
    program = shutil.which("ffmpeg")
    if program is None:
        return None
    show = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    command = [program, "-loglevel", "error", "-i", str(path), "-map", stream, *show]
    done = subprocess.run(command, capture_output=True, check=True)
    from latentact.data.decode.video import decode

    shape = next(decode(path))[1].shape
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, *shape)


def pyav_times(path: Path) -> list[float]:
    """Return the times of a video's frames, decoded with PyAV only."""
    with av.open(str(path)) as container:
        return [float(frame.time or 0) for frame in container.decode(video=0)]


# --- LeRobot datasets

Values = Callable[[int, int], Any]
"""Values of episode e, which has n rows."""


def floats(size: int) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [size], "names": None}


def state_of(e: int, n: int) -> list[list[float]]:
    return [[e + i / 100, 0.5] for i in range(n)]


def action_of(e: int, n: int) -> list[list[float]]:
    return [[100.0 * e + i, 1.0] for i in range(n)]


def image_cell(e: int, i: int) -> dict[str, Any]:
    return {"bytes": encoded(numbered(EPISODE * e + i)), "path": f"{i}.png"}


def lerobot(
    root: Path,
    version: int,
    *,
    lengths: Sequence[int] = (8, 6),
    fps: float = 10,
    cameras: Sequence[str] = (TOP,),
    cell: Callable[[int, int], Any] | None = None,
    cell_type: Any = None,
    times: Values | None = None,
    columns: Mapping[str, tuple[dict[str, Any] | None, Values | None]] | None = None,
    tasks: Values = lambda e, n: ["push"],
    texts: Sequence[str] = ("push",),
    shape: Sequence[int] = (HEIGHT, WIDTH, 3),
    names: Any = ("height", "width", "channels"),
    info: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
    video_frames: Values | None = None,
    split: bool = False,
) -> Path:
    """Write a LeRobot dataset of version 2.1 or 3.0.

    Args:
        root: folder.
        version: 2 or 3.
        lengths: rows of each episode.
        fps: rows per second.
        cameras: keys.
        cell: image of row i of episode e, in the table; None: the cameras are videos.
        cell_type: Arrow type of the images.
        times: column `timestamp`, float32 unless it is an Arrow array; None: row / fps.
        columns: name -> (feature, values); a feature None is none of `meta/info.json`, values None are none
            of the tables.
        tasks: cell `tasks` of the list of episodes.
        texts: task of each task index.
        shape: of a camera's feature.
        names: likewise.
        info: fields of `meta/info.json` that are changed.
        video: how `write_video` writes videos.
        video_frames: how many frames an episode's part of the video has; None: as many as rows.
        split: whether each episode of version 3 gets a table and a video of its own.
    """
    camera = {"dtype": "image" if cell else "video", "shape": list(shape), "names": names and list(names)}
    given = {STATE: (floats(2), state_of), ACTION: (floats(2), action_of), **(columns or {})}
    features: dict[str, Any] = dict.fromkeys(cameras, camera)
    features |= {name: feature for name, (feature, _) in given.items() if feature}
    features |= {n: {"dtype": d, "shape": [1], "names": None} for n, d in _BOOKKEEPING.items()}
    tables, row = [], 0
    for e, n in enumerate(lengths):
        table: dict[str, Any] = {name: values(e, n) for name, (_, values) in given.items() if values}
        if cell:
            kind = cell_type or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table |= {key: pa.array([cell(e, i) for i in range(n)], kind) for key in cameras}
        clock = times(e, n) if times else (np.arange(n) / fps).astype(np.float32)
        table["timestamp"] = clock if isinstance(clock, pa.Array) else np.asarray(clock, np.float32)
        counts = (np.arange(n), np.full(n, e), row + np.arange(n), np.zeros(n, np.int64))
        table |= {k: v for k, v in zip(list(_BOOKKEEPING)[1:], counts, strict=True) if k not in table}
        tables.append(pa.table(table))
        row += n
    shown = [video_frames(e, n) if video_frames else n for e, n in enumerate(lengths)]
    about = {"codebase_version": f"v{version}.{1 if version == 2 else 0}", "robot_type": "toy", "fps": fps}
    about |= {"total_episodes": len(lengths), "total_frames": row, "total_tasks": len(texts)}
    about |= {"chunks_size": 1000, "splits": {"train": f"0:{len(lengths)}"}, "features": features}
    (root / "meta").mkdir(parents=True)
    write = _write_v2 if version == 2 else _write_v3
    paths = write(root, tables, [] if cell else cameras, shown, fps, dict(video or {}), tasks, texts, split)
    (root / "meta/info.json").write_text(json.dumps({**about, **paths, **(info or {})}))
    return root


_BOOKKEEPING = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64"}
_BOOKKEEPING |= {"index": "int64", "task_index": "int64"}


def _write_v2(root, tables, cameras, shown, fps, video, tasks, texts, split) -> dict[str, Any]:
    lines = []
    for e, table in enumerate(tables):
        name = f"chunk-000/{{}}episode_{e:06d}"
        write_table(table, root / "data" / f"{name.format('')}.parquet")
        for key in cameras:
            file = root / "videos" / f"{name.format(f'{key}/')}.mp4"
            write_video(file, shown[e], start=EPISODE * e, fps=fps, **video)
        lines.append({"episode_index": e, "tasks": tasks(e, len(table)), "length": len(table)})
    write_lines(root / "meta/episodes.jsonl", lines)
    write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": t} for i, t in enumerate(texts)])
    return {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }


def _write_v3(root, tables, cameras, shown, fps, video, tasks, texts, split) -> dict[str, Any]:
    groups = [[e] for e in range(len(tables))] if split else [list(range(len(tables)))]
    rows, first = [], 0
    for place, group in enumerate(groups):
        name = f"chunk-000/file-{place:03d}"
        write_table(
            pa.concat_tables([tables[e] for e in group], promote_options="permissive"),
            root / f"data/{name}.parquet",
        )
        frames = [numbered(EPISODE * e + i) for e in group for i in range(shown[e])]
        for key in cameras:
            write_video(root / f"videos/{key}/{name}.mp4", frames, fps=fps, **video)
        start = 0.0
        for e in group:
            n = len(tables[e])
            row = {"episode_index": e, "tasks": tasks(e, n), "length": n}
            row |= {"dataset_from_index": first, "dataset_to_index": first + n}
            row |= {"data/chunk_index": 0, "data/file_index": place}
            row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
            for key in cameras:
                row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": place}
                row |= {f"videos/{key}/from_timestamp": start}
                row |= {f"videos/{key}/to_timestamp": start + shown[e] / fps}
            rows.append(row)
            first, start = first + n, start + shown[e] / fps
    write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    index = pa.table({"task_index": list(range(len(texts))), "task": list(texts)}).to_pandas()
    index.set_index("task").to_parquet(root / "meta/tasks.parquet")
    return {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
    }


def write_table(table: pa.Table, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_lines(file: Path, lines: Iterable[Any]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_tables(root: Path, change: Callable[[pa.Table], pa.Table], below: str | Path = "data") -> Path:
    """Apply a change to a table, or to every table below a folder of a dataset."""
    place = root / below
    for file in sorted(place.rglob("*.parquet")) if place.is_dir() else [place]:
        pq.write_table(change(pq.read_table(file)), file)
    return root


def change_info(root: Path, **fields: Any) -> Path:
    """Change fields of `meta/info.json`; the value ... removes a field."""
    file = root / "meta/info.json"
    info = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in info.items() if v is not ...}))
    return root


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values))


def without_first_rows(root, count):
    """Drop the first rows of each episode as editing tools do: renumber rows, keep timestamps."""

    def cut(table):
        table = table.filter(pa.array(table["frame_index"].to_numpy() >= count))
        frame = table["frame_index"].to_numpy() - count
        table = with_column(table, "frame_index", frame)
        return with_column(table, "index", np.arange(len(table)))

    def shorten(table):
        length = table["length"].to_numpy() - count
        ends = np.cumsum(length)
        for name, values in (("length", length), ("dataset_from_index", ends - length)):
            table = with_column(table, name, values)
        return with_column(table, "dataset_to_index", ends)

    change_tables(root, cut)
    change_tables(root, shorten, "meta/episodes")
    file = root / "meta/info.json"
    info = json.loads(file.read_text())
    info["total_frames"] -= count * info["total_episodes"]
    file.write_text(json.dumps(info))
    return root


@contextmanager
def lerobot_dataset(root: Path, cache: Path) -> Iterator[Any]:
    """Open a dataset with LeRobot, with `cache` as its table cache."""
    from datasets import config
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    before, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, cache
    try:
        yield LeRobotDataset("local/wild", root=root, video_backend="pyav")
    finally:
        config.HF_DATASETS_CACHE = before


def lerobot_frames(root: Path, cache: Path, camera: str = TOP) -> np.ndarray:
    """Return the frames [n, h, w, 3] decoded by LeRobot, one per row."""
    with lerobot_dataset(root, cache) as read:
        items = [read[row][camera].numpy() for row in range(len(read))]
    return np.stack([np.round(item.transpose(1, 2, 0) * 255).astype(np.uint8) for item in items])


# --- LAMs and stores


def small_lam(folder: Path, gap: int = 2, fps: float = 10.0) -> Path:
    """Write a LAM with random weights, frame gap `gap`, 32x32 pixels."""
    import torch

    from latentact.lams.models.lapo import LapoConfig
    from latentact.quantizers.none import WhitenedConfig

    torch.manual_seed(0)
    bottleneck = WhitenedConfig(dim=4)
    shape: dict[str, Any] = {"idm_channels": (8,), "fdm_channels": (8,), "patch": 8}
    model = LapoConfig(size=32, backbone="patch", **shape, bottleneck=bottleneck).build()
    model.spec = replace(model.spec, frame_gap=gap, frame_gap_s=gap / fps, fps=fps)
    model.save_pretrained(folder)
    return folder


def store(path: Path, **options: Any) -> Any:
    """Return the store of a dataset without resizing."""
    from latentact.data.cache import DataConfig, open_store

    return open_store(DataConfig(path=str(path), **{"resolution": 0, **options}))


def actions(read: Any, episodes: Iterable[int]) -> np.ndarray:
    """Return the actions of a store's episodes; masked actions are NaN, or -1 for classes."""
    found = read.actions(list(episodes))
    return np.ma.filled(found, -1 if read.action_space.discrete else np.nan)
