"""The frames of a dataset with their timestamps, tasks, states and actions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from latentact.data.access import Frames
from latentact.data.build import Entry
from latentact.data.decode.pipeline import DecodeSpec
from latentact.data.format import Source
from latentact.data.time_base import valid_transitions
from latentact.errors import UserError
from latentact.types import ActionSpace


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn from a store."""

    parts: tuple[tuple[int, int, float], ...]
    """First episode, last + 1, and weight of each dataset."""
    window: int
    """Shards to draw from at a time; 0: all."""


class FrameStore:
    """Frames of a dataset with their timestamps, tasks, states and actions.

    Robot actions are accessible only through `actions`, for explicitly listed episodes.

    Args:
        spec: decoding settings of the entry.
        entry: contents of the cache entry.
        folder: folder of the cache entry.
        path: path of the dataset.
        frames: of the entry, memory-mapped or decoded when they are indexed.
        drop_nonfinite: see `DataConfig`.
    """

    sampling: Sampling | None = None
    """How training draws samples; None: uniformly."""

    def __init__(
        self,
        spec: DecodeSpec,
        entry: Entry,
        folder: Path,
        path: Path,
        frames: Frames,
        drop_nonfinite: bool = False,
    ) -> None:
        """Describe the frames."""
        source, kept, indices = spec.source, entry.episodes, entry.frame_indices
        episodes = [source.episodes[number] for number in kept]
        self.path = path
        """Path of the dataset."""
        self.folder = folder
        """Folder of the cache entry."""
        self.frames: Frames = frames
        """uint8 `[n, h, w, c]`, 0..255."""
        self.lengths: Int64[np.ndarray, " e"] = entry.lengths
        self.starts: Int64[np.ndarray, " e"] = np.cumsum(self.lengths) - self.lengths
        """First row of each episode in this store."""
        self.episode: Int64[np.ndarray, " n"] = np.repeat(np.arange(len(kept)), self.lengths)
        """Episode (index in this store) of each row."""
        self.frame_times: Float64[np.ndarray, " n"] = entry.frame_times
        """Time of each frame in seconds since the first frame of its episode."""
        within = np.arange(len(self.episode)) - np.repeat(self.starts, self.lengths)
        self.timestamps: Float64[np.ndarray, " n"] = within / spec.fps if spec.fps else self.frame_times
        """Time of each row in seconds since the first row of its episode; after resampling, row / fps."""
        self.source_rows: Int64[np.ndarray, " n"] = indices + np.repeat(
            np.array(source.first_rows, np.int64)[kept], self.lengths
        )
        """Row in the tables of the dataset (LeRobot's `index`) of each row in this store."""
        self.episode_ids = tuple(episode.name for episode in episodes)
        """Human-readable name of each episode."""
        self.episode_contents = tuple(episode.content for episode in episodes)
        """Digest of the content of each episode, at any resolution."""
        texts, task = _tasks(source, kept, np.split(indices, np.cumsum(self.lengths)[:-1]))
        self.task_texts: tuple[str, ...] = texts
        """Distinct task texts; the empty text for rows without a task."""
        self.task: Int64[np.ndarray, " n"] = task
        """Index into `task_texts` of each row."""
        self.fps = entry.fps
        """Frames per second."""
        self._resampled_from = source.fps if spec.fps else 0.0
        self._drop_nonfinite = drop_nonfinite
        self.digest = folder.name
        """Key of the cache entry, a digest of the content."""
        self.camera = source.camera
        """Camera key; empty for plain video."""
        self.action_space: ActionSpace | None = source.action_space
        """Space of the robot actions; None for data without actions."""
        self.action_names = source.action_names
        """Names of the action classes or dimensions; may be empty."""
        self.unreadable: dict[str, str] = {**source.unreadable, **entry.unreadable}
        """Skipped files: name -> reason."""
        self._source = source
        self.groups: tuple[tuple[int, int], ...] = _groups(source, kept)
        """First episode, and last + 1, of each shard; empty for data that is not in shards."""

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.frames)

    @cached_property
    def usable(self) -> Bool[np.ndarray, " n"]:
        """Mask of the rows to use: all, or with `drop_nonfinite` those with finite state and action."""
        return (
            usable_rows(self._source)[self.source_rows]
            if self._drop_nonfinite
            else np.ones(self.num_frames, bool)
        )

    def transitions(self, gap: int) -> Bool[np.ndarray, " n"]:
        """Return the mask of rows i for which frames i and i + gap form a valid transition.

        Both frames belong to the same episode, their time difference matches the gap within tolerance, and
        both rows are usable.

        Args:
            gap: number of frames, at least 1.
        """
        valid = valid_transitions(self.frame_times, self.episode, gap, self.fps, self._resampled_from)
        valid[:-gap] &= self.usable[:-gap] & self.usable[gap:]
        return valid

    @cached_property
    def state(self) -> Float32[np.ndarray, "n s"] | None:
        """Robot state (`observation.state`) of each row; None for data without states.

        Raises:
            UserError: a value is missing, NaN or infinite. With `drop_nonfinite` such rows are zeros instead,
                which no window and no target uses.
        """
        state = self.column("observation.state")
        return None if state is None else state.reshape(len(state), -1).astype(np.float32)

    def actions(self, episodes: Collection[int] | np.ndarray) -> np.ma.MaskedArray:
        """Return the robot actions of the given episodes; all other actions are masked.

        Args:
            episodes: indices of episodes in this store.

        Returns:
            int64 `[n]` for discrete actions, else float32 `[n, a]`. The last action of an episode, which is
            never executed, is masked as well if it is not finite.

        Raises:
            UserError: the data has no actions, or an index is out of range, or without `drop_nonfinite` an
                action of the given episodes is missing, NaN or infinite.
        """
        if self.action_space is None:
            raise UserError(
                f"{self.path} must have an `action` column, got none. Give a dataset with actions."
            )
        wrong = [e for e in episodes if not 0 <= e < self.num_episodes]
        if wrong:
            raise UserError(
                f"episodes must be between 0 and {self.num_episodes - 1} for {self.path}, got {wrong[0]}."
            )
        discrete, rows = self.action_space.discrete, len(self.frames)
        actions = (
            np.zeros(rows, np.int64) if discrete else np.zeros((rows, self.action_space.size), np.float32)
        )
        visible = np.isin(self.episode, np.array(list(episodes), np.int64))
        if visible.any():
            column = self._source.column("action")
            assert column is not None
            values = column.reshape(len(column), -1)[self.source_rows]
            executed = np.ones(rows, bool)
            executed[self.starts + self.lengths - 1] = False  # many recorders omit an episode's last action
            visible &= self.usable & (executed | finite_rows(values))
            values = self._finite(values, "action", visible)[visible].reshape(-1, *actions.shape[1:])
            actions[visible] = self._classes(values) if discrete else values
        mask = np.broadcast_to(~visible if discrete else ~visible[:, None], actions.shape)
        return np.ma.MaskedArray(actions, mask=mask)

    def column(self, name: str) -> Shaped[np.ndarray, " n *shape"] | None:
        """Return a numeric column at each row, such as `observation.lam_tokens`; None if it does not exist.

        Raises:
            ValueError: the column is an action, which only `actions` returns.
            UserError: a value is missing, NaN or infinite; with `drop_nonfinite` such rows are zeros instead.
        """
        if name.partition(".")[0] == "action":
            raise ValueError(f"column must not be an action, got {name!r}. Call `actions`.")
        column = self._source.column(name)
        if column is None:
            return None
        values = column[self.source_rows]
        flat = values.reshape(len(values), -1)
        return self._finite(flat, name, np.ones(len(flat), bool)).reshape(values.shape)

    def _classes(self, values: np.ndarray) -> Int64[np.ndarray, " m"]:
        """Map raw values of a discrete action to class indices."""
        assert self.action_space is not None
        whole = values.astype(np.int64)
        return np.searchsorted(self.action_space.values, whole) if self.action_space.values else whole

    def _finite(self, values: np.ndarray, name: str, required: np.ndarray) -> np.ndarray:
        def row_name(row: int) -> str:
            episode = int(self.episode[row])
            return f"row {row - int(self.starts[episode])} of {self.episode_ids[episode]}"

        return finite(values, required, self._drop_nonfinite, f"{self.path}, column {name}", row_name)


def flagged_rows(store: FrameStore, column: str) -> Bool[np.ndarray, " n"]:
    """Return the mask of rows where a column of the data is true; all without a name.

    Raises:
        UserError: there is no such column.
    """
    if not column:
        return np.ones(len(store.episode), bool)
    values = store.column(column)
    if values is None:
        raise UserError(
            f"{store.path} must have the column {column!r}, got none. Leave the setting empty to use all "
            "rows."
        )
    return np.asarray(values.reshape(len(values), -1).any(1))


def known_rows(actions: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Return the mask of rows with an action in the result of `FrameStore.actions`."""
    return ~np.ma.getmaskarray(actions).reshape(len(actions), -1).any(1)


def usable_rows(source: Source) -> Bool[np.ndarray, " rows"]:
    """Return the mask of table rows whose state and action, where they exist, are finite."""
    rows = [first + e.frames for first, e in zip(source.first_rows, source.episodes, strict=True)]
    usable = np.ones(max(rows, default=0), bool)
    for name in ("observation.state", "action"):
        column = source.column(name)
        if column is not None:
            usable &= finite_rows(column)[: len(usable)]
    return usable


def finite_rows(values: Shaped[np.ndarray, "n *shape"]) -> Bool[np.ndarray, " n"]:
    """Return the mask of rows that are finite in float32, the dtype in which they are used."""
    with np.errstate(over="ignore"):
        return np.all(np.isfinite(values.reshape(len(values), -1).astype(np.float32)), axis=1)


def finite(
    values: Shaped[np.ndarray, "n d"],
    required: Bool[np.ndarray, " n"],
    drop: bool,
    where: str,
    row_name: Callable[[int], str],
) -> Shaped[np.ndarray, "n d"]:
    """Return values that are finite in all required rows.

    Args:
        values: values of a column.
        required: rows that are used.
        drop: replace rows with other values by zeros; the caller does not use them.
        where: name of the column in messages.
        row_name: returns the name of a row in messages.

    Raises:
        UserError: a value of a required row is missing, NaN or infinite and `drop` is False.
    """
    nonfinite = ~finite_rows(values) & required
    if not nonfinite.any():
        return values
    if not drop:
        raise UserError(
            f"{where}: {int(nonfinite.sum())} rows are missing, NaN or infinite, the first is "
            f"{row_name(int(nonfinite.argmax()))}; repair the data, or drop such rows with --drop-nonfinite "
            f"(data.drop_nonfinite=true)."
        )
    return np.where(nonfinite[:, None], np.zeros((), values.dtype), values)


def _tasks(
    source: Source, kept: np.ndarray, rows: Sequence[np.ndarray]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the distinct task texts and the index of each row's task, for the rows of the kept episodes."""
    per_episode = []
    for number, indices in zip(kept, rows, strict=True):
        tasks = source.row_tasks(int(number))  # one per row, or a single one for the whole episode
        per_episode.append(tasks[np.minimum(indices, len(tasks) - 1)])
    used, task = np.unique(np.concatenate(per_episode), return_inverse=True)
    return tuple("" if n < 0 else source.tasks[int(n)] for n in used), task


def _groups(source: Source, kept: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return the first episode, and last + 1, of each shard, counted among the kept episodes."""
    bounds = [np.searchsorted(kept, group).tolist() for group in source.groups]
    return tuple((begin, end) for begin, end in bounds if begin < end)
