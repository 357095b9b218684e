"""Training data: one dataset, or a mixture of several."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8

from latentact.config import Between
from latentact.data.access import Frames, rows_of
from latentact.data.cache import DataConfig, open_store
from latentact.data.digest import blake2b
from latentact.data.store import FrameStore, Sampling
from latentact.data.time_base import rates_agree
from latentact.errors import UserError, require_between

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One dataset of a mixture."""

    path: str
    """As `data.path`."""
    weight: float = 1.0
    """Sampling weight, relative to the other datasets."""
    camera: str = ""
    """Camera key; empty: the only camera of the dataset."""
    fps: float = 0.0
    """As `data.fps`; 0: that."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if not 0 < self.weight <= 1e9:
            raise UserError(f"weight of {self.path} in data.mixture must be more than 0, got {self.weight}.")


@dataclass(frozen=True, kw_only=True)
class TrainingDataConfig(DataConfig):
    """Which frames to train on."""

    path: str = ""
    """Dataset folder, folder of videos, shards, one video file, or hub id: `owner/name`,
    `owner/name@revision`; required without `mixture`."""
    mixture: tuple[MixturePart, ...] = ()
    """Several datasets, instead of `path`: [{path: DIR, weight: 2}, {path: DIR, camera: KEY}]."""
    shuffle_window: Annotated[int, Between(0, 10**6)] = 0
    """Number of shards from which samples are drawn at a time, for network file systems; 0: all."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        require_between("shuffle_window", self.shuffle_window, 0, 10**6)

    def require(self) -> None:
        """Check that the configuration specifies data.

        Raises:
            UserError: neither a path nor a mixture is given, or both are.
        """
        if not self.path and not self.mixture:
            raise UserError("data.path is required; give it as KEY=VALUE on the command line.")
        if self.path and self.mixture:
            raise UserError(
                f"data.path must be empty with data.mixture, got {self.path}. Add it to the list."
            )


def open_training_store(config: TrainingDataConfig) -> FrameStore:
    """Return the frames of the dataset or of the mixture.

    Raises:
        UserError: as in `open_store`, or the datasets of a mixture differ in frame rate or size.
    """
    config.require()
    single = DataConfig(**{name: getattr(config, name) for name in DataConfig.__dataclass_fields__})
    if not config.mixture:
        store = open_store(single)
        parts = ((0, store.num_episodes, 1.0),)
    else:
        stores = [
            open_store(replace(single, path=p.path, camera=p.camera, fps=p.fps or single.fps))
            for p in config.mixture
        ]
        store = MixedStore(stores)
        ends = np.cumsum([each.num_episodes for each in stores]).tolist()
        weights = [part.weight for part in config.mixture]
        parts = tuple(zip([0, *ends[:-1]], ends, weights, strict=True))
    if config.mixture or config.shuffle_window:
        store.sampling = Sampling(parts=parts, window=config.shuffle_window)
    return store


class MixedStore(FrameStore):
    """Several stores, concatenated.

    Actions and states exist if all parts have them, with the same space and size.

    Args:
        parts: the stores.

    Raises:
        UserError: they differ in frame rate or size.
    """

    def __init__(self, parts: Sequence[FrameStore]) -> None:
        """Concatenate the metadata of the parts."""
        self.parts, first = tuple(parts), parts[0]
        for other in parts[1:]:
            if not rates_agree(other.fps, first.fps):
                slowest = min(part.fps for part in parts)
                raise UserError(
                    f"datasets of data.mixture must have one frame rate, got {first.fps:g} ({first.path}) "
                    f"and {other.fps:g} ({other.path}). Set data.target_fps={slowest:g}."
                )
            if other.frames.shape[1:] != first.frames.shape[1:]:
                raise UserError(
                    f"datasets of data.mixture must have frames of one shape, got {first.frames.shape[1:]} "
                    f"({first.path}) and {other.frames.shape[1:]} ({other.path}). Set data.resolution."
                )
        self.path = Path(" + ".join(str(part.path) for part in parts))
        self.folder = first.folder
        self.frames = JoinedFrames([part.frames for part in parts])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.episode = np.repeat(np.arange(len(self.lengths)), self.lengths)
        self.frame_times = np.concatenate([part.frame_times for part in parts])
        self.timestamps = np.concatenate([part.timestamps for part in parts])
        self.source_rows = np.concatenate([part.source_rows for part in parts])
        self.episode_ids = tuple(f"{part.path}: {name}" for part in parts for name in part.episode_ids)
        self.episode_contents = tuple(content for part in parts for content in part.episode_contents)
        self.task_texts = tuple(dict.fromkeys(text for part in parts for text in part.task_texts))
        places = [np.array([self.task_texts.index(text) for text in part.task_texts]) for part in parts]
        self.task = np.concatenate([each[part.task] for each, part in zip(places, parts, strict=True)])
        self.fps = first.fps
        self.digest = blake2b(*(part.digest.encode() for part in parts))
        cameras = {part.camera for part in parts}
        self.camera = first.camera if len(cameras) == 1 else ""
        same = all(
            (p.action_space, p.action_names) == (first.action_space, first.action_names) for p in parts
        )
        if not same:
            log.warning("datasets of data.mixture have different action spaces: actions are left out")
        self.action_space = first.action_space if same else None
        self.action_names = first.action_names if same else ()
        self.unreadable = {f"{part.path}: {k}": why for part in parts for k, why in part.unreadable.items()}
        self._first_episodes = np.cumsum([0, *(part.num_episodes for part in parts)])
        self.groups = tuple(
            (int(begin + shift), int(end + shift))
            for part, shift in zip(parts, self._first_episodes[:-1], strict=True)
            for begin, end in part.groups
        )

    @cached_property
    def usable(self) -> Bool[np.ndarray, " n"]:
        """Mask of the rows to use."""
        return np.concatenate([part.usable for part in self.parts])

    @cached_property
    def state(self) -> Float32[np.ndarray, "n s"] | None:
        """Robot state of each row; None if a dataset has none or sizes differ."""
        states = [part.state for part in self.parts]
        widths = {None if state is None else state.shape[1] for state in states}
        return None if None in widths or len(widths) > 1 else np.concatenate(states)  # type: ignore[arg-type]

    def transitions(self, gap: int) -> Bool[np.ndarray, " n"]:
        """Return the mask of rows i for which frames i and i + gap form a valid transition."""
        return np.concatenate([part.transitions(gap) for part in self.parts])

    def actions(self, episodes: Collection[int] | np.ndarray) -> np.ma.MaskedArray:
        """Return the robot actions of the given episodes; all other actions are masked."""
        if self.action_space is None:
            raise UserError(
                f"{self.path} must have one action space, got none or several. Train on each dataset alone."
            )
        chosen = np.array(list(episodes), np.int64)
        spans = zip(self.parts, self._first_episodes[:-1], self._first_episodes[1:], strict=True)
        return np.ma.concatenate(
            [part.actions(chosen[(chosen >= a) & (chosen < b)] - a) for part, a, b in spans]
        )

    def column(self, name: str) -> Shaped[np.ndarray, " n *shape"] | None:
        """Return a numeric column at each row; None if a dataset lacks it."""
        columns = [part.column(name) for part in self.parts]
        return None if any(c is None for c in columns) else np.concatenate(columns)  # type: ignore[arg-type]


class JoinedFrames:
    """Frames of several stores, indexed as one array uint8 `[n, h, w, c]`."""

    dtype = np.dtype(np.uint8)

    def __init__(self, parts: Sequence[Frames]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.shape[0]

    def __getitem__(self, rows: Any) -> UInt8[np.ndarray, "*rows h w c"]:
        """Return the frames at these rows: an integer, a slice, or an array of integers or bools."""
        rows = rows_of(rows, len(self))
        flat = rows.reshape(-1)
        part = np.searchsorted(self._ends, flat, "right")
        frames = np.empty((len(flat), *self.shape[1:]), np.uint8)
        for number in np.unique(part):
            mine = part == number
            first = self._ends[number] - len(self._parts[number])
            frames[mine] = self._parts[number][flat[mine] - first]
        return frames.reshape(*rows.shape, *self.shape[1:])
