"""New columns of a LeRobot v3 dataset, by hand."""

import errno
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentact.data.lerobot import columns
from latentact.data.lerobot.columns import Column, add_columns, link

LENGTHS = (2, 3, 1)
VALUES = np.arange(12, dtype=np.float32).reshape(6, 2)


def column(values, dtype="float32"):
    return Column(dtype=dtype, size=values.shape[1], read=lambda begin, end: values[begin:end])


@pytest.fixture
def data(tmp_path):
    """Two tables with one and two episodes, a video, and the metadata of both."""
    root = tmp_path / "data"
    for folder in ("data/chunk-000", "meta/episodes/chunk-000", "videos/top/chunk-000"):
        (root / folder).mkdir(parents=True)
    (root / "videos/top/chunk-000/file-000.mp4").write_bytes(b"video")
    features = {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("episode_index", "index")}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    info = {"codebase_version": "v3.0", "features": features, "fps": 10, "note": "kept"}
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/stats.json").write_text(json.dumps({"index": {"min": [0]}}))
    episode, timestamp = np.repeat([0, 1, 2], LENGTHS), np.array([0, 0.1, 0, 0.1, 0.2, 0], np.float32)
    table = pa.table({"episode_index": episode, "index": np.arange(6), "timestamp": timestamp})
    pq.write_table(table.slice(0, 2), root / "data/chunk-000/file-000.parquet")
    pq.write_table(table.slice(2), root / "data/chunk-000/file-001.parquet", row_group_size=3)
    rows = pa.table({"episode_index": [0, 1, 2], "stats/index/min": [[0.0], [2.0], [5.0]]})
    pq.write_table(rows, root / "meta/episodes/chunk-000/file-000.parquet")
    return root


def test_rows_statistics_and_links(data, tmp_path):
    valid = np.array([True, False, True, True, False, False])[:, None]
    add_columns(
        data, tmp_path / "out", {"observation.x": column(VALUES), "observation.ok": column(valid, "bool")}
    )
    out = tmp_path / "out"
    read = pa.concat_tables([pq.read_table(f) for f in sorted((out / "data").glob("*/*.parquet"))])
    assert read["observation.x"].to_pylist() == VALUES.tolist()
    assert read["observation.ok"].to_pylist() == valid[:, 0].tolist()
    assert read["index"].to_pylist() == [*range(6)]
    assert pq.ParquetFile(out / "data/chunk-000/file-001.parquet").metadata.num_row_groups == 2
    info = json.loads((out / "meta/info.json").read_text())
    assert info["note"] == "kept"
    assert info["features"]["observation.x"] == {"dtype": "float32", "shape": [2], "names": None}
    assert info["features"]["observation.ok"]["shape"] == [1]
    episodes = pq.read_table(out / "meta/episodes/chunk-000/file-000.parquet")
    assert episodes["stats/index/min"].to_pylist() == [[0.0], [2.0], [5.0]]
    assert episodes["stats/observation.x/mean"].to_pylist() == [[1, 2], [6, 7], [10, 11]]
    assert episodes["stats/observation.x/q50"].to_pylist() == [[1, 2], [6, 7], [10, 11]]
    assert episodes["stats/observation.x/max"].to_pylist() == [[2, 3], [8, 9], [10, 11]]
    assert episodes["stats/observation.ok/mean"].to_pylist()[1] == pytest.approx([2 / 3])
    assert episodes["stats/observation.x/count"].to_pylist() == [[2], [3], [1]]
    statistics = json.loads((out / "meta/stats.json").read_text())
    assert statistics["index"] == {"min": [0]}
    assert set(statistics["observation.x"]) == {
        *("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
    }
    assert np.allclose(statistics["observation.x"]["mean"], VALUES.mean(0))
    assert np.allclose(statistics["observation.x"]["std"], VALUES.std(0))
    assert statistics["observation.x"]["count"] == [6]
    assert (out / "videos/top/chunk-000/file-000.mp4").samefile(data / "videos/top/chunk-000/file-000.mp4")


def test_a_column_of_the_same_name_gives_way(data, tmp_path):
    add_columns(data, tmp_path / "one", {"observation.x": column(VALUES)})
    add_columns(tmp_path / "one", tmp_path / "two", {"observation.x": column(VALUES[:, :1] * 2)})
    add_columns(data, tmp_path / "direct", {"observation.x": column(VALUES[:, :1] * 2)})
    for name in ("data/chunk-000/file-001.parquet", "meta/stats.json", "meta/info.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name


def test_every_file_is_read_by_itself(data, tmp_path):
    """Memory does not grow with the dataset: at most a row group or an episode is asked for at once."""
    asked = []

    def read(begin, end):
        asked.append(end - begin)
        return VALUES[begin:end]

    add_columns(data, tmp_path / "out", {"observation.x": Column(dtype="float32", size=2, read=read)})
    assert max(asked) == 3


def test_a_link_is_a_copy_where_there_are_none_and_follows_links(tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "name").symlink_to("blob")
    link(tmp_path / "name", tmp_path / "a/linked")
    assert (tmp_path / "a/linked").samefile(tmp_path / "blob")
    assert not (tmp_path / "a/linked").is_symlink()

    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(columns.os, "link", refuse)
    link(tmp_path / "name", tmp_path / "b/copied")
    assert (tmp_path / "b/copied").read_bytes() == b"x"
    assert not (tmp_path / "b/copied").samefile(tmp_path / "blob")
