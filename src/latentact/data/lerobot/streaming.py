"""Streamed LeRobot datasets with the same frames as `LeRobotDataset`.

LeRobot 0.6.1 looks up streamed frames at `index / fps`, a time since the start of the dataset and not of the
video file (huggingface/lerobot#4524), and returns the first frame of the next episode after the last one,
without marking it as padding; at the end of a file, where that frame does not exist, it fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any


def with_right_frames(items: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Return a `StreamingLeRobotDataset` with the frames of `LeRobotDataset`; other items unchanged.

    A frame is at `from_timestamp + timestamp` of its row. Frames before the first and after the last row of
    the episode repeat the frame of that row; `<camera>_is_pad` marks them.
    """
    module = sys.modules.get("lerobot.datasets.streaming_dataset")
    if module is None or not isinstance(items, module.StreamingLeRobotDataset):
        return items
    kind: Any = type("StreamingDataset", (_FileTimes, type(items)), {})
    right = kind.__new__(kind)
    vars(right).update(vars(items))
    return right


class _FileTimes:
    """Overrides the methods of `StreamingLeRobotDataset` that compute frame times."""

    meta: Any
    fps: float

    def make_frame(self, dataset_iterator: Any) -> Iterator[dict[str, Any]]:
        """Yield the next item."""
        if dataset_iterator.can_peek_ahead(1):
            row = dataset_iterator.peek_ahead(1)
            episode = self.meta.episodes[int(row["episode_index"])]
            before, now = int(row["frame_index"]), float(row["timestamp"])
            self._rows = -before, int(episode["length"]) - 1 - before
            self._times = {key: episode[f"videos/{key}/from_timestamp"] + now for key in self.meta.video_keys}
        parent: Any = super()
        yield from parent.make_frame(dataset_iterator)

    def _make_timestamps_from_indices(
        self, start_ts: float, indices: dict[str, list[int]] | None = None
    ) -> dict[str, list[float]]:
        """Return the times of the frames in their video files, in seconds, also outside the episode."""
        return {
            key: [now + offset / self.fps for offset in (indices or {}).get(key, [0])]
            for key, now in self._times.items()
        }

    def _get_query_timestamps(
        self,
        current_ts: float,
        query_indices: dict[str, list[int]] | None = None,
        episode_boundaries_ts: dict[str, tuple[float, float]] | None = None,
    ) -> dict[str, list[float]]:
        """Return the times of the frames to decode, clipped to the episode."""
        first, last = self._rows
        inside = {
            key: [min(max(offset, first), last) for offset in offsets]
            for key, offsets in (query_indices or {}).items()
        }
        return self._make_timestamps_from_indices(current_ts, inside)
