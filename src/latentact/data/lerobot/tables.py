"""The parquet tables of a LeRobot dataset: numeric columns, images and the action space.

Shared by all versions of LeRobot datasets, which differ in file layout but not in table columns.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64, Shaped, UInt8
from PIL import Image

from latentact.data.decode.color import image_rgb
from latentact.data.digest import Memo, blake2b
from latentact.data.format import Unreadable, discrete_space
from latentact.data.lerobot.metadata import BOOKKEEPING, Feature, flat_names
from latentact.errors import UserError
from latentact.io.records import open_parquet, parquet_columns, read_parquet
from latentact.types import ActionSpace

_COUNTERS = ("frame_index", "index", "task_index")
"""Index columns other than `episode_index`."""
_EXIF_ORIENTATION, _EXIF_TURNED = 0x0112, (5, 6, 7, 8)
"""EXIF tag of the orientation, and its values that swap height and width."""
_DAMAGED_IMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""Exceptions of Pillow for bytes that are not an image."""


@dataclass(frozen=True)
class Span:
    """Rows of one episode, counted over all files; an episode may span files."""

    begin: int
    """First row."""
    end: int
    """One past the last row."""


class Tables:
    """The rows of a LeRobot dataset, file by file.

    Args:
        path: the dataset.
        features: `features` of `meta/info.json`.
        files: parquet files in the order of the data.

    Raises:
        UserError: a file is not parquet or lacks the columns that every LeRobot table has.
    """

    def __init__(self, path: Path, features: Mapping[str, Feature], files: Sequence[Path]) -> None:
        """Read the rows of each episode."""
        self.path = path
        self.files = list(files)
        self.spans: dict[int, Span] = {}
        self._lock = threading.Lock()
        self._table = functools.lru_cache(maxsize=8)(self._open)
        self._row_group_column = functools.lru_cache(maxsize=4)(self._read_row_group)
        self._file_column = functools.lru_cache(maxsize=64)(self._read_file_column)
        stored: list[set[str]] = []
        timestamps, owners = [np.zeros(0)], [np.zeros(0)]
        for file in self.files:
            names = parquet_columns(file)
            stored.append(set(names))
            counters = [name for name in _COUNTERS if name in names]
            table = read_parquet(file, ["episode_index", "timestamp", *counters])
            for name in counters:
                _counter(table[name], file, name)
            owners.append(_counter(table["episode_index"], file, "episode_index"))
            timestamps.append(_plain(table["timestamp"], file, "timestamp").astype(np.float64))
        self._timestamps: Float64[np.ndarray, " rows"] = np.concatenate(timestamps)
        self._starts = np.cumsum([len(each) for each in owners])
        episodes = np.concatenate(owners)
        begins = np.flatnonzero(np.diff(episodes, prepend=np.nan))
        for begin, end in zip(begins, [*begins[1:], len(episodes)], strict=False):  # no row, no begin
            span, episode = Span(int(begin), int(end)), int(episodes[begin])
            if episode in self.spans:
                raise UserError(
                    f"{self.file(span)} must hold the rows of episode {episode} together, got other rows "
                    f"between them; rewrite the data."
                )
            self.spans[episode] = span
        self.empty = [file for file, rows in zip(self.files, owners[1:], strict=True) if not len(rows)]
        """Files without rows."""
        self.rows = len(episodes)
        """Number of rows in all files."""
        self.missing = [
            k for k, f in features.items() if f.dtype != "video" and not all(k in s for s in stored)
        ]
        """Features of `meta/info.json` that a table lacks; they are left out."""
        self.unlisted = sorted({n for s in stored for n in s} - features.keys() - {*BOOKKEEPING})
        """Columns of the tables that `meta/info.json` lacks; they are left out."""
        self.features = {k: f for k, f in features.items() if k not in self.missing}

    def timestamps(self, episode: int) -> Float64[np.ndarray, " n"]:
        """Return the column `timestamp` of an episode's rows."""
        span = self.spans[episode]
        return self._timestamps[span.begin : span.end]

    def file(self, span: Span) -> Path:
        """Return the file of the first of these rows."""
        return self.files[self._pieces(span)[0][0]]

    def _pieces(self, span: Span) -> list[tuple[int, int, int]]:
        """Return the files of an episode: (index into `files`, first row in it, one past the last)."""
        starts = self._starts
        first, last = np.searchsorted(starts, [span.begin, span.end - 1], side="right") - 1
        rows = [(n, int(starts[n]), int(starts[n + 1])) for n in range(first, last + 1)]
        return [(n, max(span.begin - a, 0), min(span.end, b) - a) for n, a, b in rows if a < b]

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return a numeric column over all files: float32, integer or bool; None if it does not exist.

        Missing values are NaN, which turns a column of integers into float64.

        Raises:
            UserError: the number of values in a row does not fit the feature's shape.
        """
        feature = self.features.get(name)
        if feature is None or not feature.numeric:
            return None
        size = int(np.prod(feature.shape))
        parts = [numbers(read_parquet(file, [name])[name], size, file, name) for file in self.files]
        array = np.concatenate(parts) if parts else np.zeros((0, size), np.float32)
        if feature.dtype.startswith("float"):
            with np.errstate(over="ignore"):  # beyond float32: infinite, which readers report by row
                array = array.astype(np.float32)
        elif array.dtype.kind == "f":
            if not feature.dtype.startswith(("int", "uint", "bool")):
                raise UserError(
                    f"{self.path / 'meta/info.json'}: features.{name}.dtype must be a numeric type, such as "
                    f"float32, got {feature.dtype!r}; repair the file or copy it again."
                )
            wrong = np.flatnonzero((np.isfinite(array) & (array != np.floor(array))).any(1))
            if len(wrong):
                raise UserError(
                    f"{self.path}: column {name} of {feature.dtype} must hold integers, got "
                    f"{array[wrong[0]].tolist()} in row {wrong[0]}; repair the data or its dtype."
                )
        return array.reshape(-1) if feature.shape in ((), (1,)) else array.reshape(-1, *feature.shape)

    def episode_column(self, name: str, episode: int) -> Any:
        """Return a column of an episode's rows: an array of numbers, or a list of strings or encoded images.

        Raises:
            Unreadable: a number or an image is missing.
            UserError: the number of values in a row does not fit the feature's shape.
        """
        feature, span = self.features[name], self.spans[episode]
        if feature.visual:
            return [
                {"bytes": data, "path": f"{n:06d}"} for n, data in enumerate(self._image_bytes(name, span))
            ]
        columns = {
            self.files[file]: self._file_column(file, name).slice(begin, end - begin)
            for file, begin, end in self._pieces(span)
        }
        if not feature.numeric:
            return [value for column in columns.values() for value in column.to_pylist()]
        size = int(np.prod(feature.shape))
        values = np.concatenate([numbers(column, size, file, name) for file, column in columns.items()])
        if not feature.dtype.startswith("float") and values.dtype.kind == "f":
            raise Unreadable(
                f"column {name} of episode {episode} must have a value in every row, as {feature.dtype} has "
                f"no NaN"
            )
        return values.reshape(-1) if feature.shape in ((), (1,)) else values.reshape(-1, *feature.shape)

    def _read_file_column(self, file: int, name: str) -> pa.ChunkedArray:
        return read_parquet(self.files[file], [name])[name]

    def images(self, camera: str, episode: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Yield the images of an episode whose camera is stored in the table or next to it.

        Raises:
            Unreadable: an image cannot be decoded, or only its path is stored and the file is missing.
        """
        for data in self._image_bytes(camera, self.spans[episode]):
            try:
                with Image.open(io.BytesIO(data)) as image:
                    yield image_rgb(image)
            except _DAMAGED_IMAGE as error:
                raise Unreadable(f"an image in it cannot be decoded ({error})") from error

    def image_shapes(self, camera: str, episode: int) -> list[tuple[int, int, int]]:
        """Return height, width and channels, as LeRobot reads them, of an episode's first and last image.

        Raises:
            Unreadable: one is missing or damaged.
        """
        span = self.spans[episode]
        shapes = []
        for row in sorted({span.begin, span.end - 1}):
            (data,) = self._image_bytes(camera, replace(span, begin=row, end=row + 1))
            try:
                with Image.open(io.BytesIO(data)) as image:
                    turned = image.getexif().get(_EXIF_ORIENTATION, 1) in _EXIF_TURNED
                    width, height = image.size[::-1] if turned else image.size
                    shapes.append((height, width, len(image.getbands())))
            except _DAMAGED_IMAGE as error:
                raise Unreadable(f"an image in it cannot be decoded ({error})") from error
        return shapes

    def image_mode(self, camera: str, episode: int) -> str:
        """Return Pillow's mode of an episode's first image.

        Raises:
            Unreadable: the image is missing or damaged.
        """
        try:
            with Image.open(io.BytesIO(next(self._image_bytes(camera, self.spans[episode])))) as image:
                return image.mode
        except _DAMAGED_IMAGE as error:
            raise Unreadable(f"an image in it cannot be decoded ({error})") from error

    def image_digests(self, camera: str, memo: Memo) -> dict[int, str]:
        """Return a digest of the encoded images of each episode, without other columns.

        An episode with missing images gets an empty digest.
        """
        by_file: dict[int, list[int]] = {}
        digests: dict[int, str] = {}
        for episode, span in self.spans.items():
            if len(pieces := self._pieces(span)) == 1:
                by_file.setdefault(pieces[0][0], []).append(episode)
            else:  # a memo of one file would not notice that another one changes
                digests[episode] = self._image_digest(camera, span, beside=True)
        for number, episodes in by_file.items():

            def find(_: Path, episodes: list[int] = episodes) -> list[str]:
                return [self._image_digest(camera, self.spans[e]) for e in episodes]

            found = memo.get(self.files[number], f"images.3:{camera}", find)
            for episode, digest in zip(episodes, found, strict=True):
                digests[episode] = digest or self._image_digest(camera, self.spans[episode], beside=True)
        return digests

    def _image_digest(self, camera: str, span: Span, beside: bool = False) -> str:
        """Return the digest of an episode's images; empty where some are missing.

        Images next to the table are read only if `beside` is set: a memo of the table would not notice that
        they change.
        """
        try:
            cells = list(self._image_cells(camera, span))
            if not beside and not all(isinstance(cell, bytes) for cell in cells):
                return ""
            return blake2b(*(self._cell(cell, f"row {row}") for row, cell in enumerate(cells)))
        except Unreadable:
            return ""

    def _image_bytes(self, camera: str, span: Span) -> Iterator[bytes]:
        for row, cell in enumerate(self._image_cells(camera, span)):
            yield self._cell(cell, f"row {row}")

    def _image_cells(self, camera: str, span: Span) -> Iterator[bytes | str | None]:
        for file, begin, end in self._pieces(span):
            ends = self._table(file)[1]
            begins, last = np.searchsorted(ends, [begin, end - 1], side="right")
            for group in range(begins, last + 1):
                first = int(ends[group - 1]) if group else 0
                yield from self._row_group(file, group, camera)[max(0, begin - first) : end - first]

    def _cell(self, cell: bytes | str | None, where: str) -> bytes:
        """Return the encoded image of a cell, which holds its bytes or the name of a file in the dataset."""
        if isinstance(cell, bytes):
            return cell
        if not cell:
            raise Unreadable(f"its image of {where} is missing from the table")
        file = self.path / cell
        if Path(cell).is_absolute() or ".." in Path(cell).parts or not file.is_file():
            raise Unreadable(f"its image of {where} is the file {cell}, which is not in the dataset")
        return file.read_bytes()

    def _row_group(self, file: int, group: int, camera: str) -> list[bytes | str | None]:
        with self._lock:
            return self._row_group_column(file, group, camera)

    def _read_row_group(self, file: int, group: int, camera: str) -> list[bytes | str | None]:
        try:
            column = self._table(file)[0].read_row_group(group, columns=[camera])[camera]
        except (OSError, pa.ArrowException) as error:
            raise Unreadable(f"its table is damaged ({error})") from error
        kind = column.type
        if not any(
            is_kind(kind)
            for is_kind in (
                pa.types.is_struct,
                pa.types.is_binary,
                pa.types.is_large_binary,
                pa.types.is_string,
            )
        ):
            raise UserError(
                f"{self.files[file]}: column {camera} must be encoded images (PNG or JPEG), got {kind}; "
                f"rewrite the data."
            )
        return [cell for chunk in column.chunks for cell in _cells(chunk)]

    def _open(self, file: int) -> tuple[pq.ParquetFile, np.ndarray]:
        """Return an open file and the end row of each of its row groups; cached, as footers can be long."""
        table = open_parquet(self.files[file])
        groups = range(table.metadata.num_row_groups)
        return table, np.cumsum([table.metadata.row_group(group).num_rows for group in groups])


def _cells(chunk: Any) -> list[bytes | str | None]:
    """Return the bytes of each image of a column, or its path where only that is stored."""
    if not pa.types.is_struct(chunk.type):
        return [value if isinstance(value, (bytes, str)) else None for value in chunk.to_pylist()]
    fields = {field.name for field in chunk.type}
    cells: list[Any] = chunk.field("bytes").to_pylist() if "bytes" in fields else len(chunk) * [None]
    if None not in cells or "path" not in fields:
        return cells
    return [
        name if data is None else data
        for data, name in zip(cells, chunk.field("path").to_pylist(), strict=True)
    ]


def action_space(tables: Tables, where: Path) -> tuple[ActionSpace | None, tuple[str, ...]]:
    """Return the action space, and the names of its classes or dimensions, which may be empty.

    Raises:
        UserError: discrete actions have too many classes.
    """
    feature = tables.features.get("action")
    if feature is None or not feature.numeric:
        return None, ()
    names = tuple(flat_names(feature.names))
    size = int(np.prod(feature.shape))
    if size == 1 and not feature.dtype.startswith("float"):
        names = names if len(names) > 1 else ()
        column = tables.column("action")
        assert column is not None
        try:
            space = discrete_space(column.reshape(-1), names)
        except ValueError as error:
            raise UserError(f"{where}, column action: {error}; store numbers as float32.") from error
        return space, names if len(names) == space.size and not space.values else ()
    return ActionSpace(kind="continuous", size=size), names if len(names) == size else ()


def column_int(tables: Tables, name: str) -> Int64[np.ndarray, " rows"] | None:
    """Return a column of integers; None if it does not exist or a row has no value."""
    column = tables.column(name)
    if column is None or column.ndim != 1 or (column.dtype.kind == "f" and not np.isfinite(column).all()):
        return None
    return column.astype(np.int64)


def _counter(column: pa.ChunkedArray, file: Path, name: str) -> np.ndarray:
    """Return a column of indices; a `task_index` may be missing (NaN) or count from the end (negative).

    Raises:
        UserError: a row does not hold one such integer.
    """
    if pa.types.is_nested(column.type) or pa.types.is_boolean(column.type):
        raise UserError(
            f"{file}: column {name} must hold one integer per row, got {column.type}; rewrite the data."
        )
    values = _plain(column, file, name)
    free = name == "task_index"
    right = ((values >= 0) | free) & (values == np.floor(values)) & np.isfinite(values)
    right |= free & np.isnan(values)
    if not right.all():
        row, least = int(np.argmin(right)), "" if free else " of at least 0"
        raise UserError(
            f"{file}: column {name} must hold integers{least}, got {values[row]:g} in row {row}; "
            f"rewrite the data."
        )
    return values


def _plain(column: pa.ChunkedArray, file: Path, name: str) -> np.ndarray:
    """Return a column of scalars; missing values are NaN."""
    return numbers(column, 1, file, name).reshape(-1)


def numbers(column: pa.ChunkedArray, size: int, file: Path, name: str) -> Shaped[np.ndarray, "rows size"]:
    """Return the values of a column, flattened per row; missing rows are NaN.

    Raises:
        UserError: a row has the wrong number of values, or they are not numbers.
    """
    rows = len(column)
    array: Any = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    empty = np.zeros(rows, bool)
    owner = np.arange(rows)  # row of each value
    while pa.types.is_nested(array.type):
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
            continue
        if not _is_list(array.type):
            raise UserError(f"{file}: column {name} must hold numbers, got {array.type}; rewrite the data.")
        empty[owner[array.is_null().to_numpy(zero_copy_only=False)]] = True
        lengths = pc.fill_null(pc.call_function("list_value_length", [array]), 0).to_numpy(
            zero_copy_only=False
        )
        owner = np.repeat(owner, lengths)
        array = array.flatten()
    if isinstance(array, pa.ExtensionArray):
        return numbers(pa.chunked_array([array.storage]), size, file, name)
    if not (
        pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)
    ):
        raise UserError(f"{file}: column {name} must hold numbers, got {array.type}; rewrite the data.")
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype == object:  # booleans with nulls
        values = np.array([np.nan if value is None else float(value) for value in values])
    counts = np.bincount(owner, minlength=rows)
    empty |= counts == 0
    wrong = np.flatnonzero((counts != size) & ~empty)
    if len(wrong):
        raise UserError(
            f"{file}: column {name} must have {size} values in every row, got {counts[wrong[0]]} in row "
            f"{wrong[0]}; rewrite the data."
        )
    if not empty.any():
        return values.reshape(rows, size)
    whole = np.full((rows, size), np.nan, np.float64 if values.dtype.itemsize > 4 else np.float32)
    whole[~empty] = values[~empty[owner]].reshape(-1, size)
    return whole


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
