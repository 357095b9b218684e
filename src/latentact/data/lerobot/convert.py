"""Write a LeRobot v3 dataset whose videos are hard links to existing files.

Video files stay unchanged, which v3 allows: an episode records its file and its position in it. The converter
of lerobot requires every listed episode and files of statistics; this one uses the available episodes,
renumbers them and computes the statistics. The output has the same frames as the kept rows of the input.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentact.data.decode.color import image_rgb
from latentact.data.decode.video import decode
from latentact.data.format import EpisodeData, Unreadable
from latentact.data.lerobot.columns import link
from latentact.data.lerobot.writer import EPISODES_FILE, Table, number_statistics, pixel_statistics
from latentact.data.time_base import LEROBOT_TOLERANCE_S, lookup_span, nearest_frames, row_times
from latentact.progress import Progress


def write_episodes(
    root: Path, features: dict[str, Any], fps: int, robot: Any, episodes: list[EpisodeData]
) -> None:
    """Write episodes as a LeRobot v3 dataset whose videos are hard links.

    Args:
        root: folder to create.
        features: name -> feature, as in `meta/info.json`.
        fps: rows per second.
        robot: robot type for the metadata.
        episodes: episodes in order.

    Raises:
        Unreadable: an image or a video is damaged, or a column has not one row per frame.
    """
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.utils.utils import flatten_dict

    meta: Any = LeRobotDatasetMetadata.create(
        "local/dataset",
        fps,
        features,
        robot,
        root,
        use_videos=any(feature["dtype"] == "video" for feature in features.values()),
    )
    rows, statistics, first_row = [], [], 0
    linked: dict[str, dict[Path, int]] = {key: {} for key in meta.video_keys}
    with Table(meta) as table, Progress("converting", len(episodes), "episodes") as progress:
        for number, episode in enumerate(episodes):
            stats: dict[str, Any] = {}
            video_location: dict[str, Any] = {}
            times = episode.times
            if times is None:
                (file,) = episode.videos.values()
                times = np.array([seconds for seconds, _ in decode(file)])
                _require_regular(times, fps, file)
            times = times[episode.rows]
            for key, file in episode.videos.items():
                seconds = times + episode.starts.get(key, 0.0)
                stats[key] = _video_statistics(file, episode.label, seconds, features[key]["shape"], fps)
                place = linked[key].setdefault(file, len(linked[key]))
                video_location |= _link_video(meta, key, file, place, seconds[0], seconds[-1] + 1 / fps)
            tasks = episode.tasks if len(episode.tasks) == 1 else episode.tasks[episode.rows]
            texts = list(dict.fromkeys(tasks))
            meta.save_episode_tasks(texts)
            columns = _columns(meta, number, first_row, episode, times, tasks)
            stats |= number_statistics({k: v for k, v in columns.items() if isinstance(v, np.ndarray)})
            stats |= {key: _image_statistics(columns[key]) for key in meta.image_keys}
            rows.append(
                {
                    "episode_index": number,
                    "tasks": texts,
                    "length": len(times),
                    "dataset_from_index": first_row,
                    "dataset_to_index": first_row + len(times),
                    **table.append(columns),
                    **video_location,
                    **flatten_dict({"stats": stats}),
                    **EPISODES_FILE,
                }
            )
            statistics.append(stats)
            first_row += len(times)
            progress.advance(1)
    _write_metadata(meta, rows, statistics)


def _write_metadata(meta: Any, rows: list[dict[str, Any]], statistics: list[dict[str, Any]]) -> None:
    """Write `meta/`: totals, statistics over all episodes, and the rows of `meta/episodes`."""
    from datasets import Dataset
    from lerobot.datasets import io_utils
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.utils.utils import SuppressProgressBars

    for key in meta.video_keys:
        meta.update_video_info(key)
    info = meta.info
    info.total_episodes = len(rows)
    info.total_frames = sum(row["length"] for row in rows)
    info.total_tasks = len(meta.tasks)
    info.splits = {"train": f"0:{len(rows)}"}
    io_utils.write_info(info, meta.root)
    io_utils.write_stats(dict(sorted(aggregate_stats(statistics).items())), meta.root)
    with SuppressProgressBars():
        io_utils.write_episodes(Dataset.from_list(rows), meta.root)


def _require_regular(times: np.ndarray, fps: int, file: Path) -> None:
    """Check that frame i of a video is at i / fps, as LeRobot expects."""
    off = np.abs(times - np.arange(len(times)) / fps)
    if len(times) and off.max() > LEROBOT_TOLERANCE_S:
        frame = int(np.argmax(off > LEROBOT_TOLERANCE_S))
        raise Unreadable(f"frame {frame} of {file} must be at {frame / fps:.4f} s, got {times[frame]:.4f} s")


def _columns(
    meta: Any, number: int, first_row: int, episode: EpisodeData, times: np.ndarray, tasks: list[str]
) -> dict[str, Any]:
    """Return the columns of an episode, including the index columns of lerobot."""
    frame_index = np.arange(len(times))
    tasks = tasks if len(tasks) > 1 else tasks * len(times)
    columns = {name: column[episode.rows] for name, column in episode.columns().items()}
    for name, column in {**columns, "task": tasks}.items():
        if len(column) != len(times):  # a video may decode to fewer frames than it lists
            raise Unreadable(
                f"{episode.label} must have a row of {name} for each of its {len(times)} frames, got "
                f"{len(column)}"
            )
    return {
        **columns,
        "timestamp": row_times(times, float(meta.fps)),
        "frame_index": frame_index,
        "episode_index": np.full_like(frame_index, number),
        "index": first_row + frame_index,
        "task_index": np.array([meta.get_task_index(task) for task in tasks]),
    }


def _link_video(meta: Any, key: str, file: Path, number: int, start: float, stop: float) -> dict[str, Any]:
    """Hard-link the video of an episode as file `number`; return its columns in `meta/episodes`."""
    chunk_index, file_index = divmod(number, meta.chunks_size)
    path = meta.root / meta.video_path.format(video_key=key, chunk_index=chunk_index, file_index=file_index)
    if not path.exists():
        link(file, path)
    return {
        f"videos/{key}/chunk_index": chunk_index,
        f"videos/{key}/file_index": file_index,
        f"videos/{key}/from_timestamp": start,
        f"videos/{key}/to_timestamp": stop,
    }


def _video_statistics(
    file: Path, label: str, times: np.ndarray, shape: tuple[int, ...], fps: int
) -> dict[str, np.ndarray]:
    """Return the statistics of a video from the rows that lerobot samples; decode and check all rows."""
    chosen, counts = set(_sampled(len(times))), []
    try:
        frames = decode(file, *lookup_span(times, float(fps)))
        for row, (_, frame) in enumerate(nearest_frames(frames, times, float(fps))):
            if frame.shape != shape:
                expected, got = (f"{width}x{height}" for height, width, _ in (shape, frame.shape))
                raise Unreadable(f"its frames must be {expected} pixels as in earlier episodes, got {got}")
            if row in chosen:
                counts.append(_counts(frame))
    except Unreadable as error:
        raise Unreadable(f"{label}, {file}: {error}") from error
    return pixel_statistics(np.sum(counts, axis=0), len(counts))


def _image_statistics(cells: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    counts = [_counts(image) for image in _images(cells)]
    return pixel_statistics(np.sum(counts, axis=0), len(counts))


def _images(cells: list[dict[str, Any]]) -> Iterator[np.ndarray]:
    for row in _sampled(len(cells)):
        with Image.open(io.BytesIO(cells[row]["bytes"])) as image:
            yield image_rgb(image)


def _sampled(length: int) -> list[int]:
    from lerobot.datasets.compute_stats import sample_indices

    return sample_indices(length)


def _counts(frame: np.ndarray) -> np.ndarray:
    """Return the histogram `[3, 256]` of the values of each channel."""
    return np.stack([np.bincount(frame[..., channel].ravel(), minlength=256) for channel in range(3)])
