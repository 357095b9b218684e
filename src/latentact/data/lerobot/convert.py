"""LeRobot v2 datasets and folders of videos as a LeRobot v3 dataset, without touching a video.

Each episode keeps its own video file, which v3 allows: it is hard-linked. lerobot's own converter wants every
episode that the metadata lists, and files of statistics; here what is there is taken, numbered anew, and its
statistics are computed. Row i of the result shows the frame that row i of the data shows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from PIL import Image

from latentact.data.decode.color import image_rgb
from latentact.data.decode.video import decode
from latentact.data.format import Unreadable
from latentact.data.lerobot.columns import link
from latentact.data.lerobot.writer import EPISODES_FILE, Table, number_statistics, pixel_statistics
from latentact.data.time_base import LEROBOT_TOLERANCE_S, nearest_frames
from latentact.progress import Progress

VIDEO_KEY = "observation.images.video"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True, kw_only=True)
class Take:
    """One episode to write."""

    label: str
    """What messages call it."""
    times: Float64[np.ndarray, " n"] | None
    """Seconds into the videos of each row; None: every frame of the video is a row."""
    tasks: list[str]
    """Task text of each row; one for all rows where there is one."""
    videos: dict[str, Path]
    """Camera -> file that holds this episode and nothing else."""
    columns: Callable[[], dict[str, Any]]
    """Returns its numbers, texts and images."""


def write_takes(root: Path, features: dict[str, Any], fps: int, robot: str | None, takes: list[Take]) -> None:
    """Write episodes as a LeRobot v3 dataset whose videos are hard links.

    Raises:
        Unreadable: an image or video of one is damaged.
    """
    from datasets import Dataset
    from lerobot.datasets import io_utils
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.utils.utils import SuppressProgressBars, flatten_dict

    videos = any(feature["dtype"] == "video" for feature in features.values())
    meta: Any = LeRobotDatasetMetadata.create("local/dataset", fps, features, robot, root, use_videos=videos)
    rows, statistics, row = [], [], 0
    with Table(meta) as table, Progress("converting", len(takes), "episodes") as progress:
        for number, take in enumerate(takes):
            stats: dict[str, Any] = {}
            place: dict[str, Any] = {}
            times = take.times
            for key, file in take.videos.items():
                if times is None:
                    times = np.array([seconds for seconds, _ in decode(file)])
                    _require_regular(times, fps, file)
                stats[key] = _video_statistics(file, take.label, times, features[key]["shape"], fps)
                place |= _link_video(meta, key, file, number, times[0], times[-1] + 1 / fps)
            assert times is not None
            length = len(times)
            tasks = list(dict.fromkeys(take.tasks))
            meta.save_episode_tasks(tasks)
            columns = _bookkeeping(meta, number, row, take, times)
            stats |= number_statistics({k: v for k, v in columns.items() if isinstance(v, np.ndarray)})
            stats |= {key: _image_statistics(columns[key]) for key in meta.image_keys}
            entry = {"episode_index": number, "tasks": tasks, "length": length}
            entry |= {"dataset_from_index": row, "dataset_to_index": row + length}
            rows.append(
                {**entry, **table.append(columns), **place, **flatten_dict({"stats": stats}), **EPISODES_FILE}
            )
            statistics.append(stats)
            row += length
            progress.advance(1)
    for key in meta.video_keys:
        meta.update_video_info(key)
    info = meta.info
    info.total_episodes, info.total_frames, info.total_tasks = len(takes), row, len(meta.tasks)
    info.splits = {"train": f"0:{len(takes)}"}
    io_utils.write_info(info, root)
    io_utils.write_stats(dict(sorted(aggregate_stats(statistics).items())), root)
    with SuppressProgressBars():
        io_utils.write_episodes(Dataset.from_list(rows), root)


def _require_regular(times: np.ndarray, fps: int, file: Path) -> None:
    """Refuse a video whose frames do not lie where LeRobot looks for them."""
    off = np.abs(times - np.arange(len(times)) / fps)
    if len(times) and off.max() > LEROBOT_TOLERANCE_S:
        frame = int(np.argmax(off > LEROBOT_TOLERANCE_S))
        raise Unreadable(f"frame {frame} of {file} is at {times[frame]:.4f} s instead of {frame / fps:.4f} s")


def _bookkeeping(meta: Any, number: int, first: int, take: Take, times: np.ndarray) -> dict[str, Any]:
    """Return an episode's columns, lerobot's own included."""
    row, seconds = np.arange(len(times)), times - times[0]
    regular = np.abs(seconds - row / meta.fps).max() < LEROBOT_TOLERANCE_S
    tasks = take.tasks if len(take.tasks) > 1 else take.tasks * len(times)
    return {
        **take.columns(),
        "timestamp": (row / meta.fps if regular else seconds).astype(np.float32),
        "frame_index": row,
        "episode_index": np.full_like(row, number),
        "index": first + row,
        "task_index": np.array([meta.get_task_index(task) for task in tasks]),
    }


def _link_video(meta: Any, key: str, file: Path, number: int, start: float, stop: float) -> dict[str, Any]:
    chunk, place = divmod(number, meta.chunks_size)
    link(file, meta.root / meta.video_path.format(video_key=key, chunk_index=chunk, file_index=place))
    values = {"chunk_index": chunk, "file_index": place, "from_timestamp": start, "to_timestamp": stop}
    return {f"videos/{key}/{name}": value for name, value in values.items()}


def _video_statistics(
    file: Path, label: str, times: np.ndarray, shape: tuple[int, ...], fps: int
) -> dict[str, np.ndarray]:
    """Return lerobot's statistics of a video from the rows that it would sample; checks all of them."""
    chosen, counts = set(_sampled(len(times))), []
    try:
        for row, (_, frame) in enumerate(nearest_frames(decode(file), times, float(fps))):
            if frame.shape != shape:
                got, wanted = ("x".join(map(str, each[1::-1])) for each in (frame.shape, shape))
                raise Unreadable(f"its frames must be {wanted} pixels as those before them, got {got}")
            if row in chosen:
                counts.append(_counts(frame))
    except Unreadable as error:
        raise Unreadable(f"{label}, {file}: {error}") from error
    return pixel_statistics(np.sum(counts, axis=0), len(counts))


def _image_statistics(cells: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    counts = [_counts(image) for image in _images(cells)]
    return pixel_statistics(np.sum(counts, axis=0), len(counts))


def _images(cells: list[dict[str, Any]]) -> Iterator[np.ndarray]:
    for place in _sampled(len(cells)):
        with Image.open(io.BytesIO(cells[place]["bytes"])) as image:
            yield image_rgb(image)


def _sampled(length: int) -> list[int]:
    from lerobot.datasets.compute_stats import sample_indices

    return sample_indices(length)


def _counts(frame: np.ndarray) -> np.ndarray:
    """Return how often each value stands in each channel, `[3, 256]`."""
    return np.stack([np.bincount(frame[..., channel].ravel(), minlength=256) for channel in range(3)])
