"""Verify a dataset that was just written by opening it with LeRobot, before it gets its final name."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from latentact.data.decode.video import video_properties
from latentact.data.format import Unreadable
from latentact.data.lerobot.metadata import cameras, read_info
from latentact.errors import UserError
from latentact.progress import Progress


def verify_dataset(root: Path, remedy: str) -> None:
    """Check files, counts, shapes, and the first and last row of each episode with LeRobot.

    Args:
        root: a LeRobot v3 dataset.
        remedy: what to do, for messages.

    Raises:
        UserError: LeRobot cannot read it.
    """
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.dataset_reader import DatasetReader

    where = "what was written"
    try:
        for name in ("meta/info.json", "meta/tasks.parquet"):  # LeRobot would look for them on the hub
            if not (root / name).is_file():
                raise ValueError(f"{name} is missing")
        meta = LeRobotDatasetMetadata("local/dataset", root=root)
        _check_files(meta, root)
        with _own_cache(root):
            reader = DatasetReader(meta, root, None, 1e-4, "pyav", None, None, return_uint8=True)
            if not reader.try_load() or reader.hf_dataset is None:
                raise ValueError("episodes or their files are missing")
            _check_counts(meta, len(reader.hf_dataset))
            features = read_info(root).features
            kept = cameras(features)
            with Progress("verifying", meta.total_episodes, "episodes") as progress:
                episodes: Any = meta.episodes
                for episode in range(meta.total_episodes):
                    row = episodes[episode]
                    for place in {row["dataset_from_index"], row["dataset_to_index"] - 1}:
                        where = f"row {place} of what was written"
                        _check_item(reader.get_item(place), features, kept, episode)
                    progress.advance(1)
    except UserError:
        raise
    except Exception as error:  # LeRobot, datasets and Arrow may raise anything
        raise UserError(f"LeRobot cannot read {where} ({_reason(error)}); {remedy}.") from error


def _reason(error: BaseException) -> str:
    """Return the first line of the root cause; `datasets` wraps errors in uninformative ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0].rstrip(".:") or type(error).__name__


def require_upright(videos: Iterable[Path]) -> None:
    """Check that videos have no display matrix and that the first stream is read: decoders differ in both.

    Raises:
        UserError: a video is rotated or mirrored, or the stream that is read is not the first.
    """
    for file in sorted(videos):
        try:
            video = video_properties(file)
        except Unreadable:
            continue
        if not video.first:
            raise UserError(
                f"{file} has {video.streams} video streams, of which LeRobot's decoders show different ones; "
                f"use --output file, or keep one: ffmpeg -i IN.mp4 -map 0:v:0 -c copy OUT.mp4."
            )
        if video.orientation != (1, 0, 0, 1):
            raise UserError(
                f"{file} is rotated or mirrored by its display matrix, which one of LeRobot's decoders "
                f"ignores; use --output file, or encode it upright: ffmpeg -i IN.mp4 OUT.mp4."
            )


@contextmanager
def _own_cache(root: Path) -> Generator[None]:
    """Let `datasets` keep its copy of the tables in a temporary folder next to the dataset."""
    from datasets import config

    before = config.HF_DATASETS_CACHE
    with TemporaryDirectory(prefix=".verify.", dir=root.parent, ignore_cleanup_errors=True) as folder:
        config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE = before


def _check_files(meta: Any, root: Path) -> None:
    for episode in range(meta.total_episodes):
        files = [meta.get_data_file_path(episode)]
        files += [meta.get_video_file_path(episode, key) for key in meta.video_keys]
        for file in files:
            if not (root / file).is_file():
                raise ValueError(f"{file} is missing")
    require_upright(
        {root / meta.get_video_file_path(e, k) for e in range(meta.total_episodes) for k in meta.video_keys}
    )


def _check_counts(meta: Any, rows: int) -> None:
    lengths = np.array(meta.episodes["length"][:])
    ends = np.array(meta.episodes["dataset_to_index"][:])
    if not rows == meta.total_frames == lengths.sum() == ends[-1] or (np.cumsum(lengths) != ends).any():
        raise ValueError(
            f"the tables have {rows} rows, info.json lists {meta.total_frames}, episodes have {lengths.sum()}"
        )


def _check_item(item: dict[str, Any], features: Any, kept: list[str], episode: int) -> None:
    if int(item["episode_index"]) != episode:
        raise ValueError(f"it belongs to episode {int(item['episode_index'])} instead of {episode}")
    for key, feature in features.items():
        if feature.numeric or key in kept:
            if item[key] is None:
                raise ValueError(f"{key} is null, which LeRobot cannot batch")
            got = tuple(item[key].shape)
            height, width, channels = feature.hwc if feature.visual else (0, 0, 0)
            expected = (channels, height, width) if feature.visual else feature.shape
            if got != expected and not (expected == (1,) and got == ()):
                raise ValueError(f"{key} must have the shape {list(expected)}, got {list(got)}")
