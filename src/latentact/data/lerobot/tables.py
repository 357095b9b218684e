"""The parquet tables of a LeRobot dataset: numeric columns, pictures, and what its features mean.

Shared by the LeRobot formats, whose versions differ in where things lie and not in what the tables hold.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, Shaped, UInt8
from PIL import Image

from latentact.data.digest import Memo, blake2b
from latentact.data.format import Unreadable
from latentact.errors import UserError
from latentact.types import ActionSpace

_VISUAL = ("image", "video")


@dataclass(frozen=True)
class Span:
    """Rows of one episode."""

    file: int
    """Place of the file in `Tables.files`."""
    begin: int
    """First row inside the file."""
    end: int
    """One past the last row inside the file."""
    first_row: int
    """First row counted over all files."""


class Tables:
    """The rows of a LeRobot dataset, file by file.

    Args:
        features: `features` of `meta/info.json`.
        files: parquet files in the order of the data.

    Raises:
        UserError: a file is not parquet or lacks the columns that every LeRobot table has.
    """

    def __init__(self, features: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Read which rows belong to which episode."""
        self.features = features
        self.files = list(files)
        self.spans: dict[int, Span] = {}
        self._timestamps: list[Float64[np.ndarray, " rows"]] = []
        self._lock = threading.Lock()
        self._table = functools.lru_cache(maxsize=8)(self._open)
        self._row_group_column = functools.lru_cache(maxsize=4)(self._read_row_group)
        row = 0
        for number, file in enumerate(self.files):
            table = _read(file, ["episode_index", "timestamp"])
            episodes = table["episode_index"].to_numpy()
            self._timestamps.append(table["timestamp"].to_numpy().astype(np.float64))
            begins = np.flatnonzero(np.diff(episodes, prepend=-1))
            for begin, end in zip(begins, [*begins[1:], len(episodes)], strict=True):
                episode = int(episodes[begin])
                if episode in self.spans:
                    raise UserError(
                        f"{file} holds rows of episode {episode} apart from its others; rewrite the data."
                    )
                self.spans[episode] = Span(number, int(begin), int(end), row + int(begin))
            row += len(episodes)
        self.rows = row
        """Rows of all files."""

    def timestamps(self, episode: int) -> Float64[np.ndarray, " n"]:
        """Return the seconds of an episode's rows, from its first."""
        span = self.spans[episode]
        return self._timestamps[span.file][span.begin : span.end]

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return a numeric column over all files: float32, integer or bool; None: there is none."""
        feature = self.features.get(name)
        if feature is None or feature["dtype"] in (*_VISUAL, "string", "language"):
            return None
        shape = () if list(feature["shape"]) == [1] else tuple(feature["shape"])
        parts = [_numeric(_read(file, [name])[name]).reshape(-1, *shape) for file in self.files]
        array = np.concatenate(parts)
        return array.astype(np.float32) if array.dtype.kind == "f" else array

    def images(self, camera: str, episode: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Yield the pictures of an episode whose camera is stored inside the table.

        Raises:
            Unreadable: a picture cannot be decoded, or only its path is stored and the file is not there.
        """
        for data in self._image_bytes(camera, self.spans[episode]):
            try:
                with Image.open(io.BytesIO(data)) as image:
                    yield np.asarray(image.convert("RGB"))
            except OSError as error:
                raise Unreadable(f"a picture in it cannot be decoded ({error})") from error

    def image_digests(self, camera: str, memo: Memo) -> dict[int, str]:
        """Return a digest of the encoded pictures of each episode; other columns do not enter."""
        by_file: dict[int, list[int]] = {}
        for episode, span in self.spans.items():
            by_file.setdefault(span.file, []).append(episode)
        digests: dict[int, str] = {}
        for number, episodes in by_file.items():

            def find(_: Path, episodes: list[int] = episodes) -> list[str]:
                return [blake2b(*self._image_bytes(camera, self.spans[e])) for e in episodes]

            found = memo.get(self.files[number], f"images:{camera}", find)
            digests.update(zip(episodes, found, strict=True))
        return digests

    def _image_bytes(self, camera: str, span: Span) -> Iterator[bytes]:
        ends = self._table(span.file)[1]
        begin, last = np.searchsorted(ends, [span.begin, span.end - 1], side="right")
        for group in range(begin, last + 1):
            first = int(ends[group - 1]) if group else 0
            cells = self._row_group(span.file, group, camera)
            for data in cells[max(0, span.begin - first) : span.end - first]:
                if data is None:
                    raise Unreadable("its pictures are not stored in the table")
                yield data

    def _row_group(self, file: int, group: int, camera: str) -> list[bytes | None]:
        with self._lock:
            return self._row_group_column(file, group, camera)

    def _read_row_group(self, file: int, group: int, camera: str) -> list[bytes | None]:
        column = self._table(file)[0].read_row_group(group, columns=[f"{camera}.bytes"])[camera]
        return [data for chunk in column.chunks for data in chunk.field("bytes").to_pylist()]

    def _open(self, file: int) -> tuple[pq.ParquetFile, np.ndarray]:
        """Return an open file and the row at which each of its groups ends; kept, as footers can be long."""
        table = pq.ParquetFile(self.files[file])
        groups = range(table.metadata.num_row_groups)
        return table, np.cumsum([table.metadata.row_group(group).num_rows for group in groups])


def cameras(features: Mapping[str, Any]) -> list[str]:
    """Return the camera keys of a LeRobot dataset; depth is not a camera."""
    return [
        key
        for key, feature in features.items()
        if feature["dtype"] in _VISUAL and not (feature.get("info") or {}).get("video.is_depth_map", False)
    ]


def action_space(tables: Tables) -> tuple[ActionSpace | None, tuple[str, ...]]:
    """Return what an action is, and the names of its classes or dimensions (empty where there are none)."""
    feature = tables.features.get("action")
    if feature is None:
        return None, ()
    names = tuple(_flat_names(feature.get("names")))
    size = int(np.prod(feature["shape"]))
    if size == 1 and not feature["dtype"].startswith("float"):
        names = names if len(names) > 1 else ()
        column = tables.column("action") if not names else None
        classes = int(column.max()) + 1 if column is not None else len(names)
        return ActionSpace(kind="discrete", size=classes), names
    return ActionSpace(kind="continuous", size=size), names if len(names) == size else ()


def _flat_names(names: Any) -> Iterator[str]:
    if isinstance(names, str):
        yield names
    elif isinstance(names, Mapping):
        yield from _flat_names(list(names.values()))
    elif names is not None:
        for name in names:
            yield from _flat_names(name)


def _numeric(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    while pa.types.is_nested(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)


def _read(file: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.ParquetFile(file).read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the dataset again.") from error
