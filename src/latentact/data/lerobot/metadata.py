"""The metadata of a LeRobot dataset (`meta/`), versions 2.0 to 3.0, as validated records."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, Field, field_validator

from latentact.data.format import FASTEST, SLOWEST, choose_camera
from latentact.errors import UserError
from latentact.io.records import Record, parquet_columns, read_parquet, read_record, read_records

VISUAL = ("image", "video")
"""Values of `dtype` that mark a camera."""
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns that LeRobot adds to every table."""
_CHANNELS = (1, 3, 4)


class Feature(Record):
    """One entry of `features`."""

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(strict=False)
    names: Any = None
    info: Annotated[dict[str, Any] | None, BeforeValidator(lambda value: value or None)] = None
    video_info: Annotated[dict[str, Any] | None, BeforeValidator(lambda value: value or None)] = None

    @property
    def visual(self) -> bool:
        """Whether it is a camera."""
        return self.dtype in VISUAL

    @property
    def numeric(self) -> bool:
        """Whether it is numeric."""
        return not self.visual and self.dtype not in ("string", "language")

    @property
    def depth(self) -> bool:
        """Whether it is a depth map."""
        about = {**(self.video_info or {}), **(self.info or {})}
        return any(bool(about.get(key)) for key in ("is_depth_map", "video.is_depth_map"))

    @property
    def hwc(self) -> tuple[int, int, int]:
        """Height, width and channels of a camera, whichever order the shape has.

        Raises:
            UserError: the shape is not that of an image.
        """
        if len(self.shape) == 3:
            names = [str(name).lower() for name in self.names] if isinstance(self.names, Sequence) else []
            first = len(names) == 3 and names[0].startswith(("c", "rgb", "depth"))
            last = len(names) == 3 and names[2].startswith(("c", "rgb", "depth"))
            if first or (not last and self.shape[0] in _CHANNELS and self.shape[2] not in _CHANNELS):
                return self.shape[1], self.shape[2], self.shape[0]
            return self.shape[0], self.shape[1], self.shape[2]
        if len(self.shape) == 2:
            return self.shape[0], self.shape[1], 1
        raise UserError(f"a camera's shape must be [height, width, channels], got {list(self.shape)}.")


class Info(Record):
    """`meta/info.json`."""

    codebase_version: str
    fps: Annotated[float, Field(ge=SLOWEST, le=FASTEST)]
    features: dict[str, Feature]
    chunks_size: Annotated[int, Field(ge=1)] = 1000
    data_files_size_in_mb: Annotated[float, Field(gt=0)] = 100
    video_files_size_in_mb: Annotated[float, Field(gt=0)] = 200
    total_episodes: Annotated[int, Field(ge=0)] | None = None
    total_frames: Annotated[int, Field(ge=0)] | None = None
    total_tasks: Annotated[int, Field(ge=0)] | None = None
    splits: Any = None
    robot_type: Any = None
    data_path: str | None = None
    video_path: str | None = None

    @field_validator("data_path", "video_path")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        fields = {"episode_chunk", "episode_index", "video_key", "chunk_index", "file_index"}
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(value or "") if name is not None}
        except ValueError as error:
            raise ValueError(f"a path with {{placeholders}} ({error})") from error
        if found - fields:
            raise ValueError(f"a path whose placeholders are among {', '.join(sorted(fields))}")
        if value and (value.startswith("/") or ".." in Path(value).parts):
            raise ValueError("a path inside the dataset")
        return value

    def file(self, path: Path, template: str, **values: Any) -> str:
        """Return the name of a file, relative to the dataset at `path`.

        Args:
            path: the dataset.
            template: name of the template field.
            values: values of the placeholders.

        Raises:
            UserError: the template is missing, or has other placeholders.
        """
        text = getattr(self, template)
        try:
            if not text:
                raise KeyError(template)
            return text.format(**values)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"{path / 'meta/info.json'}: {template} must be a path with {', '.join(sorted(values))}, got "
                f"{text!r}; repair the file or copy it again."
            ) from error


def read_info(path: Path) -> Info:
    """Return `meta/info.json` of a dataset.

    Raises:
        UserError: the file cannot be read or is invalid.
    """
    return read_record(Info, path / "meta/info.json")


def cameras(features: Mapping[str, Feature]) -> list[str]:
    """Return the camera keys, without depth maps."""
    return [key for key, feature in features.items() if feature.visual and not feature.depth]


def choose_lerobot_camera(features: Mapping[str, Feature], camera: str, path: Path) -> str:
    """Return `camera`, or the only camera if it is empty.

    Raises:
        UserError: no camera has this name, it is a depth map, or several exist and none is given.
    """
    known = cameras(features)
    maps = [key for key, feature in features.items() if feature.visual and feature.depth]
    if camera in maps or (maps and not known):
        raise UserError(
            f"{path}: {camera or maps[0]} is a depth map (is_depth_map), which LeRobot returns as distances; "
            f"give a camera of images, got {', '.join(known) or 'none'}."
        )
    arrays = [key for key, feature in features.items() if not feature.visual and len(feature.shape) == 3]
    if arrays and not known:
        raise UserError(
            f"{path} has no camera, as {arrays[0]} has the dtype {features[arrays[0]].dtype}; write it with "
            f"the dtype image or video."
        )
    return choose_camera(known, camera, path)


class _Task(Record):
    task_index: int
    task: str


class EpisodeLine(Record):
    """A line of `meta/episodes.jsonl` (version 2)."""

    episode_index: Annotated[int, Field(ge=0)]
    tasks: tuple[str | None, ...] = Field(default=(), strict=False)
    length: int | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @property
    def texts(self) -> list[str]:
        """Task texts of the episode."""
        return [task for task in self.tasks if task]


def read_episode_lines(path: Path) -> list[EpisodeLine]:
    """Return the episodes of a version 2 dataset.

    Raises:
        UserError: `meta/episodes.jsonl` cannot be read or is invalid.
    """
    return read_records(EpisodeLine, path / "meta/episodes.jsonl")


class Tasks(NamedTuple):
    """The table of tasks."""

    texts: dict[int, str]
    """Text of each `task_index` of the data's rows; in version 3 also of negative ones."""
    notes: list[str]
    """Notes about inconsistencies."""


def read_tasks(path: Path) -> Tasks:
    """Return the table of tasks, which may be empty.

    As in LeRobot, a `task_index` of version 2 is looked up in the column of this name of `tasks.jsonl`, and
    one of version 3 is the number of a row of `tasks.parquet`, from the end if negative: -1 is the last.

    Raises:
        UserError: the table cannot be read, is invalid or contradicts itself.
    """
    lines, table = path / "meta/tasks.jsonl", path / "meta/tasks.parquet"
    if lines.is_file():
        texts: dict[int, str] = {}
        for line in read_records(_Task, lines):
            if texts.setdefault(line.task_index, line.task) != line.task:
                raise UserError(
                    f"{lines}: task_index {line.task_index} must have one task, got "
                    f"{texts[line.task_index]!r} and {line.task!r}; keep one."
                )
        return Tasks(texts, [])
    if not table.is_file():
        return Tasks({}, [])
    rows = read_parquet(table)
    known = [name for name in rows.column_names if not pa.types.is_nested(rows[name].type)]
    names = [name for name in ("task", "__index_level_0__") if name in known]
    columns = names or [name for name in known if _is_text(rows[name].type) and name != "task_index"]
    if not columns:
        raise UserError(
            f"{table} must have a column task of texts, got {', '.join(rows.column_names)}; copy the dataset "
            f"again."
        )
    named = list(enumerate(rows[columns[0]].to_pylist()))
    texts = {n - end: str(text) for end in (0, len(rows)) for n, text in named if text is not None}
    index = rows["task_index"].to_pylist() if "task_index" in rows.column_names else len(rows) * [None]
    moved = next((n for n, value in enumerate(index) if value != n), None)
    if moved is None:
        return Tasks(texts, [])
    note = (
        f"meta/tasks.parquet: task_index must be the row's number, by which LeRobot finds a task, got "
        f"{index[moved]} in row {moved}; tasks are read as LeRobot reads them"
    )
    return Tasks(texts, [note])


def read_episode_table(path: Path, camera: str) -> pa.Table:
    """Return the columns of `meta/episodes` of a version 3 dataset that give the location of its episodes.

    Args:
        path: the dataset.
        camera: key of the video whose location is read; empty: none.

    Raises:
        UserError: the table is missing or damaged, or a required column is missing or not numeric.
    """
    needed = (
        [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        if camera
        else []
    )
    return read_episodes(path, ["episode_index", *needed], ["tasks", f"videos/{camera}/to_timestamp"])


def read_episodes(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Return columns of `meta/episodes` of a version 3 dataset.

    Args:
        path: the dataset.
        needed: required columns of finite numbers; index columns hold integers.
        optional: other columns, which may be missing.

    Raises:
        UserError: the table is missing or damaged, or a required column is missing or not numeric.
    """
    files = sorted((path / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(
            f"{path} has no meta/episodes/*/*.parquet; copy the dataset again, or finalize its recording."
        )
    parts = []
    for file in files:
        known = parquet_columns(file)
        table = read_parquet(file, [*needed, *(name for name in optional if name in known)])
        _require_numbers(table, needed, file)
        parts.append(table)
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"the files of {path / 'meta/episodes'} do not fit together ({error}); copy the dataset again."
        ) from error


def _require_numbers(table: pa.Table, names: Sequence[str], file: Path) -> None:
    """Check that columns hold a finite number in every row, and index columns an integer."""
    for name in names if len(table) else ():
        kind = table[name].type
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not number or table[name].null_count or not np.isfinite(table[name].to_numpy()).all():
            raise UserError(
                f"{file}: column {name} must hold a number in every row, got {kind} with "
                f"{table[name].null_count} nulls; copy the dataset again."
            )
        values = table[name].to_numpy()
        wrong = np.flatnonzero((values < 0) | (values != np.floor(values)))
        if name.endswith("_index") and len(wrong):
            raise UserError(
                f"{file}: column {name} must hold integers of at least 0, got {values[wrong[0]]:g} in "
                f"row {wrong[0]}; copy the dataset again."
            )


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def flat_names(names: Any) -> list[str]:
    """Return the names of a feature's dimensions, flattened."""
    if isinstance(names, str):
        return [names]
    if isinstance(names, Mapping):
        names = list(names.values())
    return [] if not isinstance(names, Sequence) else [text for name in names for text in flat_names(name)]


def task_list(value: Any) -> list[str]:
    """Return the task texts of a cell that holds a list of strings, a string, or nothing."""
    values = (
        [value] if isinstance(value, str) else value if isinstance(value, (list, tuple, np.ndarray)) else []
    )
    return [text for text in values if isinstance(text, str) and text]
