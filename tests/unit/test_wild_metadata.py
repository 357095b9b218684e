"""Metadata as it really lies on disk: read, or refused in one sentence, never a traceback."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentact.data.digest import Memo
from latentact.data.format import open_source
from latentact.data.lerobot.metadata import Feature
from latentact.errors import UserError
from latentact.io.records import parse_record
from wild import (
    TOP,
    change_info,
    change_tables,
    image_cell,
    lerobot,
    lerobot_dataset,
    numbers,
    store,
    with_column,
    write_lines,
    write_table,
)

ROWS = [*range(8), *range(20, 26)]
EITHER = pytest.mark.parametrize("version", [2, 3])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Datasets with images in the table, by version."""
    root = tmp_path_factory.mktemp("good")
    return {v: lerobot(root / str(v), v, cell=image_cell) for v in (2, 3)}


@pytest.fixture
def copy(good, tmp_path):
    return lambda version: shutil.copytree(good[version], tmp_path / f"copy{version}")


def opened(path, cache, camera=""):
    """Return the source at a path, or the sentence that refuses it."""
    try:
        return open_source(path, camera, Memo(cache, path))
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 700
    return message


# --- info.json (F21, F38)

READ = {
    "fps_float": {"fps": 10.0},
    "no_robot": {"robot_type": None},
    "no_counts": {"total_episodes": None, "total_frames": None},
    "counts_missing": {"total_episodes": ..., "total_frames": ..., "total_tasks": ...},
    "counts_wrong": {"total_frames": 3},
    "no_chunks": {"chunks_size": ...},
    "unknown_field": {"license": "apache", "splits": None},
    "video_path_null": {"video_path": None},
}
REFUSED = {
    "fps_text": ({"fps": "ten"}, "fps must be"),
    "fps_null": ({"fps": None}, "fps must be"),
    "fps_zero": ({"fps": 0}, "fps must be at least 0.0001, got 0"),
    "fps_negative": ({"fps": -10}, "fps must be at least 0.0001"),
    "fps_tiny": ({"fps": 1e-320}, "fps must be at least 0.0001"),
    "fps_huge": ({"fps": 1e308}, "fps must be at most 1000000"),
    "total_tasks_text": ({"total_tasks": "v9"}, "total_tasks must be a valid integer, got 'v9'"),
    "total_tasks_infinite": ({"total_tasks": float("inf")}, "total_tasks must be a"),
    "total_frames_negative": ({"total_frames": -1}, "total_frames must be at least 0, got -1"),
    "total_episodes_nan": ({"total_episodes": float("nan")}, "total_episodes must be a"),
    "data_size_text": ({"data_files_size_in_mb": ""}, "data_files_size_in_mb must be a valid number, got ''"),
    "data_size_infinite": ({"data_files_size_in_mb": float("inf")}, "data_files_size_in_mb must be a finite"),
    "video_size_negative": (
        {"video_files_size_in_mb": -1},
        "video_files_size_in_mb must be greater than 0, got -1",
    ),
    "splits_surrogate": ({"splits": {"train\ud800": "0:2"}}, "half of a character, \\ud800"),
    "fps_missing": ({"fps": ...}, "fps is missing"),
    "fps_list": ({"fps": [10]}, "fps must be"),
    "chunks_zero": ({"chunks_size": 0}, "chunks_size must be at least 1, got 0"),
    "chunks_text": ({"chunks_size": "1000"}, "chunks_size must be"),
    "features_list": ({"features": []}, "features must be"),
    "features_null": ({"features": None}, "features must be"),
    "features_missing": ({"features": ...}, "features is missing"),
    "features_empty": ({"features": {}}, "has no camera"),
    "feature_null": ({"features": {TOP: None}}, f"features.{TOP} must be"),
    "feature_text": ({"features": {TOP: "video"}}, f"features.{TOP} must be"),
    "dtype_missing": ({"features": {TOP: {"shape": [32, 48, 3]}}}, "dtype is missing"),
    "shape_missing": ({"features": {TOP: {"dtype": "image"}}}, "shape is missing"),
    "shape_text": ({"features": {TOP: {"dtype": "image", "shape": "32x48"}}}, "shape"),
    "shape_float": ({"features": {TOP: {"dtype": "image", "shape": [32.5, 48, 3]}}}, "shape"),
    "shape_null": ({"features": {TOP: {"dtype": "image", "shape": None}}}, "shape"),
    "version_missing": ({"codebase_version": ...}, "holds no data that can be read"),
    "version_old": ({"codebase_version": "v1.6"}, "holds no data that can be read"),
    "version_null": ({"codebase_version": None}, "holds no data that can be read"),
}
PATHS = {
    "data_path_null": ({"data_path": None}, "data_path must be a path"),
    "data_path_other": (
        {"data_path": "data/{episode}.parquet"},
        "data_path must be a path whose placeholders",
    ),
    "data_path_broken": ({"data_path": "data/{episode_index"}, "data_path must be a path with"),
    "data_path_outside": ({"data_path": "../{episode_index}.parquet"}, "data_path must be a path inside"),
    "data_path_attribute": ({"data_path": "{episode_index.real}"}, "data_path must be a path whose"),
    "data_path_number": ({"data_path": 3}, "data_path must be"),
    "data_path_format": ({"data_path": "data/{episode_index:zz}.parquet"}, "data_path must be a path with"),
}


@pytest.mark.parametrize("kind", READ)
@EITHER
def test_info_that_can_be_read_is_read(copy, kind, version):
    root = change_info(copy(version), **READ[kind])
    assert numbers(store(root).frames) == ROWS


@pytest.mark.parametrize("kind", REFUSED)
@EITHER
def test_info_that_does_not_fit_names_its_field(copy, tmp_path, kind, version):
    fields, words = REFUSED[kind]
    assert words in opened(change_info(copy(version), **fields), tmp_path)


@pytest.mark.parametrize("kind", PATHS)
def test_paths_that_do_not_fit_name_their_field(copy, tmp_path, kind):
    fields, words = PATHS[kind]
    assert words in opened(change_info(copy(2), **fields), tmp_path)


VIDEO_PATHS = [None, "", "videos/{episode}.mp4", "videos/x.mp4", 3, "/abs/{video_key}.mp4", "{video_key!z}"]


@pytest.mark.parametrize("value", VIDEO_PATHS)
@EITHER
def test_a_video_path_that_does_not_fit_is_one_sentence(tmp_path, value, version):
    root = change_info(lerobot(tmp_path / "d", version, lengths=(2,)), video_path=value)
    assert isinstance(opened(root, tmp_path), str)


TEXTS = {
    "empty": b"",
    "cut": b'{"codebase_version": "v3.0", "fps"',
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "html": b"<html>",
    "latin1": '{"codebase_version": "v2.1", "robot_type": "é"}'.encode("latin-1"),
    "utf16": '{"codebase_version": "v2.1"}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "nul": b"\0" * 64,
    "not_a_number": b'{"codebase_version": "v2.1", "fps": NaN, "features": {}}',
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["info.json", "episodes.jsonl", "tasks.jsonl"])
def test_text_files_that_are_something_else_are_one_sentence(copy, tmp_path, kind, name):
    root = copy(2)
    (root / "meta" / name).write_bytes(TEXTS[kind])
    source = opened(root, tmp_path)
    assert isinstance(source, str) or (name == "tasks.jsonl" and kind == "empty")


@pytest.mark.parametrize("name", ["info.json", "episodes.jsonl", "tasks.jsonl"])
def test_text_files_with_a_byte_order_mark_or_empty_lines_are_read(copy, name):
    root = copy(2)
    file = root / "meta" / name
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert numbers(store(root).frames) == ROWS


@pytest.mark.parametrize("name", ["info.json", "episodes.jsonl"])
def test_files_that_are_missing_are_one_sentence(copy, tmp_path, name):
    root = copy(2)
    (root / "meta" / name).unlink()
    assert isinstance(opened(root, tmp_path), str)


# --- tables of version 3 (F04, F38)

TABLES = ["meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet", "meta/tasks.parquet"]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["no_footer", "empty", "text", "flipped", "folder"])
def test_parquet_that_is_none_is_one_sentence(copy, tmp_path, name, kind):
    root = copy(3)
    file = root / name
    data = file.read_bytes()
    if kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        middle = data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :]
        file.write_bytes({"no_footer": data[:-40], "empty": b"", "text": b"hello", "flipped": middle}[kind])
    source = opened(root, tmp_path)
    if kind in ("no_footer", "empty", "text"):
        assert file.name in source
    elif not isinstance(source, str):  # zeros may fall into bytes of images
        assert len(source.episodes) == 2


def test_a_cut_file_of_statistics_stops_no_reading(copy):
    root = copy(3)
    (root / "meta/stats.json").write_text('{"action": {"mean": [0.')
    assert numbers(store(root).frames) == ROWS


def tasks_like_official_ones(root):
    """Let the list of episodes lack `tasks`, as that of lerobot/libero."""
    change_tables(root, lambda t: with_column(t, "task_index", [0] * 8 + [1] * 6))
    return change_tables(root, lambda t: t.drop_columns(["tasks"]), "meta/episodes")


def test_episodes_without_the_column_tasks_have_those_of_their_rows(tmp_path):
    pytest.importorskip("lerobot")
    root = lerobot(tmp_path / "d", 3, cell=image_cell, texts=("push", "pull"))
    tasks_like_official_ones(root)
    read = store(root)
    with lerobot_dataset(root, tmp_path) as theirs:
        texts = [theirs[row]["task"] for row in range(14)]
    assert [read.task_texts[task] for task in read.task] == texts == ["push"] * 8 + ["pull"] * 6


@pytest.mark.parametrize("name", ["episode_index", "from_timestamp", "chunk_index", "file_index"])
@pytest.mark.parametrize("kind", ["missing", "null", "text", "nan", "some_null"])
def test_places_of_episodes_that_are_none_are_one_sentence(tmp_path, name, kind):
    column = name if name == "episode_index" else f"videos/{TOP}/{name}"
    values = {
        "null": pa.nulls(2),
        "text": pa.array(["0", "one"]),
        "nan": pa.array([0.0, float("nan")]),
        "some_null": pa.array([0, None]),
    }

    def change(table):
        return table.drop_columns([column]) if kind == "missing" else with_column(table, column, values[kind])

    root = change_tables(lerobot(tmp_path / "d", 3), change, "meta/episodes")
    message = opened(root, tmp_path)
    assert isinstance(message, str)
    assert column in message


def test_places_of_other_number_types_are_read(tmp_path):
    def change(table):
        for place, name in enumerate(table.column_names):
            if name.endswith(("_index", "timestamp")) and name != "tasks":
                table = table.set_column(place, name, table[name].cast(pa.float64()))
        return table

    root = change_tables(lerobot(tmp_path / "d", 3), change, "meta/episodes")
    assert numbers(store(root).frames) == ROWS


def test_an_episode_that_is_listed_twice_is_read_once(tmp_path, copy):
    root = copy(2)
    lines = (root / "meta/episodes.jsonl").read_text().splitlines()
    (root / "meta/episodes.jsonl").write_text("\n".join([lines[0], lines[1], lines[0]]) + "\n")
    assert numbers(store(root).frames) == ROWS
    root = copy(3)
    change_tables(root, lambda t: pa.concat_tables([t, t.slice(0, 1)]), "meta/episodes")
    assert numbers(store(root).frames) == ROWS
    change_tables(root, lambda t: t.take([0, 0, 1]), "meta/episodes")  # LeRobot shows row 1 as episode 1
    assert "each once, because LeRobot looks episodes up by position, got [0, 0, 1]" in opened(root, tmp_path)


def test_an_index_of_episodes_without_rows_is_one_sentence(copy, tmp_path):
    root = change_tables(copy(3), lambda t: t.slice(0, 0), "meta/episodes")
    assert "but has the files of none" in opened(root, tmp_path)
    root = copy(2)
    (root / "meta/episodes.jsonl").write_text("\n")
    assert "but has the files of none" in opened(root, tmp_path)


TASK_TABLES = {
    "index": lambda: pa.table({"task_index": [0], "__index_level_0__": ["push"]}),
    "plain": lambda: pa.table({"task": ["push"], "task_index": [0]}),
    "large_text": lambda: pa.table({"task": pa.array(["push"], pa.large_string()), "task_index": [0]}),
    "other_name": lambda: pa.table({"name": pa.array(["push"], pa.large_string()), "task_index": [0]}),
    "dictionary": lambda: pa.table({"task": pa.array(["push"]).dictionary_encode(), "task_index": [0]}),
    "float_index": lambda: pa.table({"task": ["push"], "task_index": [0.0]}),
    "no_index": lambda: pa.table({"task": ["push"]}),
    "nan_index": lambda: pa.table({"task": ["push"], "task_index": [float("nan")]}),
    "text_index": lambda: pa.table({"task": ["push"], "task_index": ["zero"]}),
    "nulls_too": lambda: pa.table({"task": ["push", None], "task_index": [0, 1]}),
}
BAD_TASK_TABLES = {
    "no_text": lambda: pa.table({"task_index": [0]}),
    "number_text": lambda: pa.table({"task": [[1]], "task_index": [[0]]}),
}


@pytest.mark.parametrize("kind", TASK_TABLES)
def test_tables_of_tasks_are_read_as_pandas_writes_them(copy, kind):
    root = change_tables(copy(3), lambda t: t.drop_columns(["tasks"]), "meta/episodes")
    write_table(TASK_TABLES[kind](), root / "meta/tasks.parquet")
    assert store(root).task_texts == ("push",)


@pytest.mark.parametrize("kind", BAD_TASK_TABLES)
def test_tables_of_tasks_that_do_not_fit_are_one_sentence(copy, tmp_path, kind):
    root = copy(3)
    write_table(BAD_TASK_TABLES[kind](), root / "meta/tasks.parquet")
    assert "tasks.parquet" in opened(root, tmp_path)


def per_row_tasks(root, index, texts=("push", "pull")):
    """Let rows have tasks by `task_index`, which the table lists in the order of `index`."""
    rows = np.arange(14) % 2
    change_tables(root, lambda t: with_column(t, "task_index", rows))
    write_table(pa.table({"task_index": list(index), "task": list(texts)}), root / "meta/tasks.parquet")
    frame = pq.read_table(root / "meta/tasks.parquet").to_pandas().set_index("task")
    frame.to_parquet(root / "meta/tasks.parquet")
    return change_info(root, total_tasks=2)


@pytest.mark.parametrize("index", [(0, 1), (1, 0), (4, 9)])
def test_tasks_of_rows_are_those_that_lerobot_shows(copy, tmp_path, index):
    lerobot_datasets = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    root = per_row_tasks(copy(3), index)
    shown = lerobot_datasets.LeRobotDataset("local/dataset", root=root)
    read = store(root)
    assert [read.task_texts[n] for n in read.task] == [shown[i]["task"] for i in range(14)]
    note = f"task_index must be the row's number, by which LeRobot finds a task, got {index[0]} in row 0"
    notes = open_source(root, "", Memo(tmp_path / "memo", root)).notes
    assert any(note in line for line in notes) == (index != (0, 1))


@pytest.mark.parametrize("value", [-0.5, 0.5, [0]])
@EITHER
def test_a_task_index_that_is_none_is_one_sentence(copy, tmp_path, value, version):
    root = copy(version)
    change_tables(root, lambda t: with_column(t, "task_index", [value] * len(t)))
    assert "column task_index must hold " in opened(root, tmp_path)


def test_a_discrete_action_that_is_not_whole_names_its_row(tmp_path):
    values = [0.0, 1.0, 0.5, *[0.0] * 11]
    feature = {"dtype": "int64", "shape": [1], "names": None}
    columns = {"action": (feature, lambda e, n: pa.array(values[:n], pa.float64()))}
    root = lerobot(tmp_path / "d", 3, cell=image_cell, columns=columns)
    assert "column action of int64 must hold integers, got [0.5] in row 2" in opened(root, tmp_path)


def test_two_texts_of_one_task_are_refused(copy, tmp_path):
    root = copy(2)
    lines = [{"task_index": 0, "task": "push"}, {"task_index": 0, "task": "pull"}]
    write_lines(root / "meta/tasks.jsonl", lines)
    assert "task_index 0 must have one task, got 'push' and 'pull'; keep one" in opened(root, tmp_path)
    write_lines(root / "meta/tasks.jsonl", [lines[0], lines[0]])
    assert store(root).task_texts == ("push",)


def test_lengths_that_contradict_the_tables_are_noted(copy, tmp_path):
    root = copy(2)
    episodes = [{"episode_index": e, "tasks": ["push"], "length": n} for e, n in enumerate((8, 5))]
    write_lines(root / "meta/episodes.jsonl", episodes)
    note = (
        "meta/episodes.jsonl: length of episode 1 must be 6 as in its table, got 5; the table's rows are used"
    )
    assert open_source(root, "", Memo(tmp_path / "memo", root)).notes == [note]
    assert numbers(store(root).frames) == ROWS


def test_rows_of_episodes_that_are_not_listed_are_noted(copy, tmp_path):
    root = change_tables(copy(3), lambda t: t.slice(0, 1), "meta/episodes")
    (note,) = open_source(root, "", Memo(tmp_path / "memo", root)).notes
    assert "rows of 1 episodes, such as episode 1, are in the tables but not in the list" in note


SURROGATES = ["meta/info.json", "meta/tasks.jsonl", "meta/episodes.jsonl"]


@pytest.mark.parametrize("name", SURROGATES)
def test_half_a_character_is_one_sentence(copy, tmp_path, name):
    root = copy(2)
    text = (root / name).read_text()
    (root / name).write_text(text.replace('{"', '{"\\uD83D": 1, "', 1))
    assert r"must be Unicode text, got half of a character, \ud83d" in opened(root, tmp_path)
    (root / name).write_text(text.replace('{"', '{"\\uD83D\\uDE00": 1, "', 1))  # both halves
    assert numbers(store(root).frames) == ROWS


def test_two_values_of_one_key_are_refused(copy, tmp_path):
    root = copy(2)
    text = (root / "meta/info.json").read_text()
    (root / "meta/info.json").write_text(text.replace('"fps": 10', '"fps": 10, "fps": 20'))
    assert "'fps' must have one value, got 10 and 20; keep one" in opened(root, tmp_path)
    (root / "meta/info.json").write_text(text.replace('"fps": 10', '"fps": 10, "fps": 10'))
    assert numbers(store(root).frames) == ROWS


def test_texts_of_tables_that_are_not_utf8_are_one_sentence(copy, tmp_path):
    root = copy(3)
    buffers = [pa.py_buffer(np.int32([0, 2]).tobytes()), pa.py_buffer(b"\xc3\x28")]
    task = pa.StringArray.from_buffers(1, *buffers)
    write_table(pa.table({"task_index": [0], "task": task}), root / "meta/tasks.parquet")
    assert "tasks.parquet cannot be read as parquet (In chunk 0: Invalid: Invalid UTF8" in opened(
        root, tmp_path
    )


# --- texts of tasks (F17)

CELLS = {
    "text": ("push the block", "push the block"),
    "null": (None, ""),
    "list_of_null": ([None], ""),
    "empty": ([], ""),
    "empty_text": ([""], ""),
    "two": (["reach", "push"], "reach / push"),
}


@pytest.mark.parametrize("kind", CELLS)
@EITHER
def test_the_tasks_of_an_episode_may_be_a_text_or_nothing(tmp_path, kind, version):
    value, want = CELLS[kind]
    kinds = {"text": pa.string(), "null": pa.string()}
    root = lerobot(tmp_path / "d", version, cell=image_cell, tasks=lambda e, n: ["x"], texts=())
    if version == 2:
        write_lines(root / "meta/episodes.jsonl", [{"episode_index": e, "tasks": value} for e in (0, 1)])
    else:
        column = pa.array([value, value], kinds.get(kind, pa.list_(pa.string())))
        change_tables(root, lambda t: with_column(t, "tasks", column), "meta/episodes")
    assert store(root).task_texts == (want,)


@pytest.mark.parametrize("value", [3, [3], {"a": 1}, [["push"]], True])
def test_tasks_that_are_no_texts_are_one_sentence(copy, tmp_path, value):
    root = copy(2)
    write_lines(root / "meta/episodes.jsonl", [{"episode_index": 0, "tasks": value}])
    assert "episodes.jsonl, line 1" in opened(root, tmp_path)


@pytest.mark.parametrize("value", [None, -1, "0", 0.5, [0]])
def test_an_episode_index_that_is_none_is_one_sentence(copy, tmp_path, value):
    root = copy(2)
    write_lines(root / "meta/episodes.jsonl", [{"episode_index": value, "tasks": []}])
    assert "episodes.jsonl, line 1: episode_index" in opened(root, tmp_path)


# --- shapes (F03)


@pytest.mark.parametrize(
    ("shape", "names", "hwc"),
    [
        ([3, 32, 48], ["channels", "height", "width"], (32, 48, 3)),
        ([3, 32, 48], ["channel", "height", "width"], (32, 48, 3)),
        ([3, 32, 48], ["c", "h", "w"], (32, 48, 3)),
        ([3, 32, 48], ["rgb", "height", "width"], (32, 48, 3)),
        ([3, 32, 48], None, (32, 48, 3)),
        ([1, 32, 48], None, (32, 48, 1)),
        ([4, 32, 48], "chw", (32, 48, 4)),
        ([32, 48, 3], None, (32, 48, 3)),
        ([32, 48, 3], ["height", "width", "rgb"], (32, 48, 3)),
        ([32, 48, 3], ["height", "width", "channel"], (32, 48, 3)),
        ([3, 4, 3], None, (3, 4, 3)),
        ([32, 48], None, (32, 48, 1)),
        ([32, 48, 3], {"axes": 3}, (32, 48, 3)),
    ],
)
def test_shapes_of_cameras_are_understood_in_either_order(shape, names, hwc):
    feature = parse_record(Feature, {"dtype": "video", "shape": shape, "names": names}, "info.json")
    assert feature.hwc == hwc


@pytest.mark.parametrize("shape", [[3, 32, 48], [32, 48], [], [1, 3, 32, 48]])
def test_frames_are_read_whatever_their_feature_says_of_their_shape(tmp_path, shape):
    root = lerobot(tmp_path / "d", 2, cell=image_cell, shape=shape, names=None)
    assert numbers(store(root).frames) == ROWS


def test_values_of_metadata_survive(good):
    info = json.loads((good[2] / "meta/info.json").read_text())
    assert info["fps"] == 10
    assert pq.read_table(good[3] / "meta/tasks.parquet").num_rows == 1
    assert np.all(np.diff(ROWS) > 0)
