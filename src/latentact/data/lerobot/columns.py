"""Add columns to a LeRobot v3 dataset: rewrite tables, hard-link videos, write statistics.

`add_features` of lerobot copies the videos, needs all values in memory and writes no statistics. This module
streams file by file and also writes per-episode statistics, which the editing tools of lerobot need to keep
the statistics of the new columns.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from latentact.data.files import files_below
from latentact.data.lerobot.metadata import Feature, read_info
from latentact.data.lerobot.tables import Tables, numbers
from latentact.data.lerobot.writer import number_statistics
from latentact.errors import UserError
from latentact.io.records import open_parquet, parse_json, read_parquet, read_text

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A numeric column with values for every row of a dataset."""

    dtype: str
    """float32, float16, int64 or bool."""
    size: int
    """Values per row."""
    read: Callable[[int, int], Shaped[np.ndarray, "m size"]]
    """`read(begin, end)` returns the values of these rows, counted over all files sorted by name."""
    names: Any = None
    """Names of the values, as in `meta/info.json`."""

    @property
    def feature(self) -> dict[str, Any]:
        """The feature of the column in `meta/info.json`."""
        return {"dtype": self.dtype, "shape": [self.size], "names": self.names}


def add_columns(source: Path, out: Path, columns: Mapping[str, Column]) -> None:
    """Copy a LeRobot v3 dataset and add columns; existing columns of the same name are replaced.

    Args:
        source: folder of the dataset; not modified.
        out: existing empty folder for the new dataset; the caller makes the write atomic.
        columns: name -> column.

    Raises:
        UserError: `source` is not a complete LeRobot v3 dataset.
    """
    info = parse_json(read_text(source / "meta/info.json"), str(source / "meta/info.json"))
    files = sorted((source / "data").glob("*/*.parquet"))
    tables = Tables(source, read_info(source).features, files)
    for name in tables.missing:
        del info["features"][name]
    for feature in info["features"].values():
        feature["shape"] = feature["shape"] or [1]  # LeRobot does not support shape []
    info["features"] |= {name: column.feature for name, column in columns.items()}
    for folder in (source / "videos", source / "images"):
        for path in files_below(folder)[0] if folder.is_dir() else ():
            link(path, out / path.relative_to(source))
    for path in files_below(source / "meta")[0]:
        (out / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / path.relative_to(source))
    schema = _schema(info["features"])
    row = 0
    for file in files:
        row = _rewrite(file, out / file.relative_to(source), columns, schema, tables.features, row)
    per_episode = {}
    for episode, span in tables.spans.items():
        begin, end = span.begin, span.end
        values = {name: column.read(begin, end) for name, column in columns.items()}
        per_episode[episode] = number_statistics(values)
    for file in sorted((out / "meta/episodes").glob("*/*.parquet")):
        _add_episode_statistics(file, columns, per_episode)
    _add_statistics(out / "meta/stats.json", [per_episode[episode] for episode in sorted(per_episode)])
    (out / "meta/info.json").write_text(json.dumps(info, indent=4, ensure_ascii=False))


def link(path: Path, out: Path) -> None:
    """Hard-link the file at `path` to `out`; copy it if linking is impossible. Follows symbolic links."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), out)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(path, out)


def _schema(features: Mapping[str, Any]) -> Any:
    """Return the Arrow schema of the tables, as lerobot defines it."""
    from lerobot.datasets.feature_utils import get_hf_features_from_features

    shaped = {
        name: {**feature, "shape": tuple(feature["shape"]) or (1,)} for name, feature in features.items()
    }
    return get_hf_features_from_features(shaped).arrow_schema


def _rewrite(
    file: Path,
    out: Path,
    columns: Mapping[str, Column],
    target: Any,
    features: Mapping[str, Feature],
    row: int,
) -> int:
    """Write a table with the added columns by row groups; return the first row of the next file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.parent.mkdir(parents=True, exist_ok=True)
    with open_parquet(file) as table:
        kept = [f for f in table.schema_arrow if f.name in target.names and f.name not in columns]
        schema = pa.schema([*kept, *(target.field(name) for name in columns)], metadata=target.metadata)
        with pq.ParquetWriter(out, schema, compression="snappy", use_dictionary=True) as writer:
            for number in range(table.metadata.num_row_groups):
                group = table.read_row_group(number, columns=[field.name for field in kept])
                arrays = [_without_nulls(group[f.name], features.get(f.name), file, f.name) for f in kept]
                for name, column in columns.items():
                    values = column.read(row, row + len(group))
                    arrays.append(_array(values, schema.field(name).type))
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
                row += len(group)
    return row


def _without_nulls(column: Any, feature: Feature | None, file: Path, name: str) -> Any:
    """Return a column of floats with NaN for missing numbers: LeRobot cannot put a null into a batch."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if feature is None or not feature.dtype.startswith("float") or len(feature.shape) > 1:
        return column
    nested = pa.types.is_nested(column.type)
    if not column.null_count and not (nested and pc.call_function("list_flatten", [column]).null_count):
        return column
    values = numbers(column, int(np.prod(feature.shape)), file, name)
    flat = pa.array(values.reshape(-1))
    return (pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if nested else flat).cast(column.type)


def _array(values: np.ndarray, arrow_type: Any) -> Any:
    """Convert values `[m, size]` to an Arrow array of the given type."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    if not pa.types.is_nested(arrow_type):
        return flat.cast(arrow_type)
    if pa.types.is_fixed_size_list(arrow_type):
        return pa.FixedSizeListArray.from_arrays(flat, type=arrow_type)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, flat, type=arrow_type)


def _add_episode_statistics(
    file: Path, columns: Mapping[str, Column], per_episode: Mapping[int, Mapping[str, Any]]
) -> None:
    """Add `stats/<column>/<statistic>` columns to a table of episodes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = read_parquet(file)
    episodes = table["episode_index"].to_pylist()
    if absent := [episode for episode in episodes if episode not in per_episode]:
        raise UserError(
            f"{file} lists episode {absent[0]}, which has no rows in data/; copy the dataset again."
        )
    statistics = [per_episode[episode] for episode in episodes]
    prefixes = tuple(f"stats/{name}/" for name in columns)
    table = table.drop_columns([name for name in table.column_names if name.startswith(prefixes)])
    for name in columns:
        for kind in statistics[0][name] if statistics else ():
            values = [each[name][kind].tolist() for each in statistics]
            table = table.append_column(f"stats/{name}/{kind}", pa.array(values))
    pq.write_table(table.replace_schema_metadata(None), file, compression="snappy")


def _add_statistics(file: Path, per_episode: list[dict[str, dict[str, np.ndarray]]]) -> None:
    """Add the aggregated statistics of the new columns to `meta/stats.json`."""
    from lerobot.datasets.compute_stats import aggregate_stats

    statistics = parse_json(read_text(file), str(file)) if file.is_file() else {}
    if not isinstance(statistics, dict):
        raise UserError(
            f"{file} must contain a JSON object, got {type(statistics).__name__}; copy the dataset again."
        )
    for name, values in aggregate_stats(per_episode).items():
        statistics[name] = {kind: value.tolist() for kind, value in sorted(values.items())}
    file.write_text(json.dumps(dict(sorted(statistics.items())), indent=4))
