"""`latentact precompute` on data as people have it: LeRobot shows the frames that the tokens belong to."""

import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file

from conftest import TINY_LAM, cli
from latentact.data.cache import DataConfig, open_store
from latentact.errors import UserError
from wild import (
    ACTION,
    HEIGHT,
    STATE,
    TOP,
    WIDTH,
    change_info,
    change_tables,
    encoded,
    floats,
    image_cell,
    lerobot,
    lerobot_dataset,
    lerobot_frames,
    number,
    numbered,
    numbers,
    small_lam,
    store,
    with_column,
    without_first_rows,
    write_lines,
    write_table,
    write_video,
)
from wild_rows import (
    EITHER,
    ROWS,
    TOKENS,
    VALID,
    opened,
    refused,
    tokens_of,
    written,
)

pytest.importorskip("lerobot")


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    """A LAM of random weights that looks two frames ahead at 10 fps."""
    return small_lam(tmp_path_factory.mktemp("lam") / "lam")


# --- LeRobot datasets in, LeRobot datasets out

ODD = {
    "plain": {},
    "images": {"cell": image_cell},
    "channels_first": {"shape": (3, HEIGHT, WIDTH), "names": ("channels", "height", "width")},
    "channels_first_images": {
        "cell": image_cell,
        "shape": (3, HEIGHT, WIDTH),
        "names": ("rgb", "height", "width"),
    },
    "no_names": {"names": None},
    "wrong_size": {"shape": (480, 640, 3)},
    "two_cameras": {"cameras": (TOP, f"{TOP}_2")},
    "one_row": {"lengths": (8, 1, 5)},
    "scalar": {
        "columns": {
            "next.reward": (
                {"dtype": "float32", "shape": [], "names": None},
                lambda e, n: np.zeros(n, np.float32),
            )
        }
    },
    "lacking": {"columns": {"next.success": ({"dtype": "bool", "shape": [1], "names": None}, None)}},
    "text": {"columns": {"note": ({"dtype": "string", "shape": [1], "names": None}, lambda e, n: ["x"] * n)}},
    "nulls": {
        "columns": {
            ACTION: (
                floats(2),
                lambda e, n: pa.array([*[[1.0, 2.0]] * (n - 1), None], pa.list_(pa.float32())),
            )
        }
    },
    "fps_float": {"fps": 10.0},
    "no_tasks": {"tasks": lambda e, n: [], "texts": ("",)},
}
VERSION_2 = {"late": {"times": lambda e, n: 0.4 + np.arange(n) / 10, "video_frames": lambda e, n: n + 4}}
VERSION_2 |= {
    "longer_video": {"video_frames": lambda e, n: n + 3},
    "float64": {"times": lambda e, n: pa.array(np.arange(n) / 10)},
}


@pytest.mark.parametrize("kind", [*ODD, *VERSION_2])
def test_version_2_becomes_a_dataset_whose_rows_show_the_frames_of_the_tokens(tmp_path, lam, kind):
    given = {**ODD, **VERSION_2}[kind]
    root = lerobot(tmp_path / "d", 2, **given)
    out = written(root, lam, tmp_path / "out", *(("--camera-key", TOP) if kind == "two_cameras" else ()))
    ours, lengths = store(root, camera=TOP).frames, given.get("lengths", (8, 6))
    shown, tokens = opened(out, tmp_path)
    start = 4 if kind == "late" else 0
    assert shown == numbers(ours) == [20 * e + i + start for e, n in enumerate(lengths) for i in range(n)]
    np.testing.assert_allclose(tokens, tokens_of(lam, ours, lengths), atol=1e-5)
    feature = json.loads((out / "meta/info.json").read_text())["features"][TOP]
    assert feature["shape"] == [HEIGHT, WIDTH, 3] or kind == "wrong_size"


@pytest.mark.parametrize("kind", [k for k in ODD if k not in ("no_names", "text")])
def test_version_3_keeps_its_rows(tmp_path, lam, kind):
    given = ODD[kind]
    root = lerobot(tmp_path / "d", 3, **given)
    out = tmp_path / "out"
    more = ("--camera-key", TOP) if kind == "two_cameras" else ()
    if kind == "wrong_size":  # LeRobot itself shows frames of another size
        assert re.search("shape must be .* as in videos", refused(root, lam, out, *more))
        found = json.loads(cli("check-data", root, "--json", "--max-frames", "0").stdout)
        assert not found["verdict"].startswith("Ready")
        return
    written(root, lam, out, *more)
    ours, lengths = store(root, camera=TOP).frames, given.get("lengths", (8, 6))
    shown, tokens = opened(out, tmp_path)
    assert shown == numbers(ours) == [20 * e + i for e, n in enumerate(lengths) for i in range(n)]
    np.testing.assert_allclose(tokens, tokens_of(lam, ours, lengths), atol=1e-5)


def test_policies_see_channels_first_whatever_the_data_message(tmp_path, lam):
    from lerobot.utils.feature_utils import dataset_to_policy_features

    root = lerobot(tmp_path / "d", 2, shape=(3, HEIGHT, WIDTH), names=("channels", "height", "width"))
    with lerobot_dataset(written(root, lam, tmp_path / "out"), tmp_path) as read:
        assert dataset_to_policy_features(read.meta.features)[TOP].shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("folder", [f"videos/{TOP}", "videos", "meta/episodes", "data"])
def test_linked_folders_are_part_of_the_output(tmp_path, lam, folder):
    root = lerobot(tmp_path / "d", 3)
    shutil.move(root / folder, tmp_path / "disk")
    (root / folder).symlink_to(tmp_path / "disk")
    shown, _ = opened(written(root, lam, tmp_path / "out"), tmp_path)
    assert shown == ROWS


@EITHER
def test_tasks_of_rows_are_those_of_the_output(tmp_path, lam, version):
    listed = {"tasks": lambda e, n: ["reach", "push"], "texts": ("reach", "push")}
    root = lerobot(tmp_path / "d", version, lengths=(6, 6), **listed)
    change_tables(root, lambda t: with_column(t, "task_index", np.arange(len(t)) % 6 // 3))
    with lerobot_dataset(written(root, lam, tmp_path / "out"), tmp_path) as read:
        assert [read[row]["task"] for row in range(12)] == [*["reach"] * 3, *["push"] * 3] * 2


def test_an_index_of_episodes_without_tasks_is_kept(tmp_path, lam):
    root = lerobot(tmp_path / "d", 3)
    change_tables(root, lambda t: t.drop_columns(["tasks"]), "meta/episodes")
    with lerobot_dataset(written(root, lam, tmp_path / "out"), tmp_path) as read:
        assert read[9]["task"] == "push"


@EITHER
def test_an_episode_whose_clock_is_none_leaves_the_others_aligned(tmp_path, lam, version):
    def times(e, n):
        return np.arange(n) % 3 / 10 if e == 1 else np.arange(n) / 10

    root = lerobot(tmp_path / "d", version, lengths=(5, 6, 7), times=times)
    out = written(root, lam, tmp_path / "out", "--output", "both")
    sidecar = json.loads((out / "meta/lam_tokens.json").read_text())
    assert [name.split(" in ")[0] for name in sidecar["unreadable"]] == ["episode 1"]
    ours = store(root).frames
    want = tokens_of(lam, ours, (5, 7))
    with lerobot_dataset(out, tmp_path) as read:
        tokens = np.stack([np.asarray(row) for row in read.hf_dataset[TOKENS]])
        valid = np.array([float(row) for row in read.hf_dataset[VALID]])
        last = number((read[len(read) - 1][TOP].numpy().transpose(1, 2, 0) * 255).astype(np.uint8))
    assert last == 46
    if version == 3:  # its rows stay, without tokens
        assert not tokens[5:11].any()
        assert not valid[5:11].any()
        tokens = np.delete(tokens, np.s_[5:11], axis=0)
    np.testing.assert_allclose(tokens, want, atol=1e-5)


def test_rows_edited_away_keep_tokens_and_frames_together(tmp_path, lam):
    root = without_first_rows(lerobot(tmp_path / "d", 3), 2)
    out = written(root, lam, tmp_path / "out")
    shown, tokens = opened(out, tmp_path)
    assert shown == [*range(2, 8), *range(22, 26)]
    np.testing.assert_allclose(tokens, tokens_of(lam, lerobot_frames(root, tmp_path), (6, 4)), atol=2e-2)


def test_lerobots_edit_tools_keep_tokens_with_their_rows(tmp_path, lam):
    from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets, split_dataset

    lengths = (5, 6, 7)
    for version in (2, 3):
        base = tmp_path / str(version)
        root = lerobot(base / "d", version, lengths=lengths, cell=image_cell)
        out = written(root, lam, base / "out")
        with lerobot_dataset(out, base / "hf") as read:
            tokens = np.stack([np.asarray(row) for row in read.hf_dataset[TOKENS]])
            fewer = delete_episodes(read, [1], output_dir=base / "fewer", repo_id="local/fewer")
            parts = split_dataset(read, {"a": [0, 1], "b": [2]}, output_dir=base / "split")
            whole = merge_datasets([parts["b"], parts["a"]], "local/merged", output_dir=base / "merged")
            for edited, rows in ((fewer, [*range(5), *range(11, 18)]), (whole, [*range(11, 18), *range(11)])):
                found = np.stack([np.asarray(row) for row in edited.hf_dataset[TOKENS]])
                np.testing.assert_array_equal(found, tokens[rows])
                want = [[*range(5), *range(20, 26), *range(40, 47)][row] for row in rows]
                frames = [edited[row][TOP].numpy().transpose(1, 2, 0) * 255 for row in range(len(edited))]
                assert numbers(frames) == want


# --- data that LeRobot itself cannot open

BROKEN = {
    "rows_missing": lambda r: change_tables(r, lambda t: t.slice(0, 10)),
    "counts_wrong": lambda r: change_info(r, total_frames=99),
    "index_wrong": lambda r: change_tables(
        r, lambda t: with_column(t, "dataset_to_index", [3, 7]), "meta/episodes"
    ),
    "table_cut": lambda r: [p.write_bytes(p.read_bytes()[:-40]) for p in (r / "data").rglob("*.parquet")],
    "episodes_cut": lambda r: [
        p.write_bytes(p.read_bytes()[:-40]) for p in (r / "meta/episodes").rglob("*.parquet")
    ],
    "tasks_cut": lambda r: (r / "meta/tasks.parquet").write_bytes(b"x"),
    "stats_cut": lambda r: (r / "meta/stats.json").write_text('{"a"'),
    "stats_list": lambda r: (r / "meta/stats.json").write_text("[]"),
    "no_video": lambda r: [p.unlink() for p in r.rglob("*.mp4")],
    "no_tasks_table": lambda r: (r / "meta/tasks.parquet").unlink(),
    "no_video_path": lambda r: change_info(r, video_path=None),
    "dataset_index_missing": lambda r: change_tables(
        r, lambda t: t.drop_columns(["dataset_from_index"]), "meta/episodes"
    ),
}


def on_episodes(name, values):
    """Return a change of a column of `meta/episodes`."""
    return lambda r: change_tables(r, lambda t: with_column(t, name, values), "meta/episodes")


def on_rows(name, change):
    """Return a change of a column of the rows."""

    def apply(table):
        return with_column(table, name, change(table[name].to_numpy().copy()))

    return lambda r: change_tables(r, apply)


def put(row, value, dtype=None):
    def change(values):
        values = values.astype(dtype or values.dtype)
        values[row] = value
        return values

    return change


def info_with(**fields):
    return lambda r: change_info(r, **fields)


BROKEN |= {
    "episode_not_listed": lambda r: change_tables(r, lambda t: t.slice(0, 1), "meta/episodes"),
    "episodes_swapped": lambda r: change_tables(r, lambda t: pa.concat_tables([t.slice(8), t.slice(0, 8)])),
    "video_of_another_size": lambda r: write_video(next(r.rglob("*.mp4")), 14, size=(48, 64)),
    "task_index_beyond": on_rows("task_index", put(3, 7)),
    "task_index_negative": on_rows("task_index", put(3, -2)),
    "episode_index_half": on_rows("episode_index", put(3, 0.5, float)),
    "episode_index_lists": on_rows("episode_index", lambda v: [[int(e)] for e in v]),
    "frame_index_half": on_rows("frame_index", put(3, 3.5, float)),
    "index_text": on_rows("index", lambda v: [str(i) for i in v]),
    "file_index_float": on_episodes("data/file_index", [0.0, 0.0]),
    "file_index_half": on_episodes(f"videos/{TOP}/file_index", [0.5, 0.0]),
    "file_index_beyond": on_episodes("data/file_index", [0, 3]),
    "length_wrong": on_episodes("length", [8, 5]),
    "total_tasks_text": info_with(total_tasks="v9"),
    "total_tasks_zero": info_with(total_tasks=0),
    "total_episodes_missing": info_with(total_episodes=...),
    "total_frames_negative": info_with(total_frames=-1),
    "data_size_text": info_with(data_files_size_in_mb=""),
    "video_size_negative": info_with(video_files_size_in_mb=-1),
    "video_size_infinite": info_with(video_files_size_in_mb=float("inf")),
    "splits_surrogate": info_with(splits={"\ud800": "0:2"}),
    "task_not_utf8": lambda r: write_table(
        pa.table(
            {
                "task_index": [0],
                "task": pa.StringArray.from_buffers(
                    1, pa.py_buffer(np.int32([0, 2]).tobytes()), pa.py_buffer(b"\xc3\x28")
                ),
            }
        ),
        r / "meta/tasks.parquet",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_datasets_are_refused_in_one_sentence_and_nothing_is_left(tmp_path, lam, kind):
    root = lerobot(tmp_path / "d", 3)
    (root / "meta/stats.json").write_text("{}")
    BROKEN[kind](root)
    message = refused(root, lam, tmp_path / "out")
    assert message.startswith("error: ")
    assert "LeRobot cannot read" not in message  # it is found before anything is written
    assert re.search(r"meta/|column |data: |files|parquet", message), message
    found = json.loads(cli("check-data", root, "--json", "--max-frames", "0").stdout)
    assert not found["verdict"].startswith("Ready"), message


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA", "turned"])
@EITHER
def test_images_that_lerobot_reads_in_another_shape_are_found_beforehand(tmp_path, lam, mode, version):
    def cell(e, i):
        image = Image.fromarray(numbered(20 * e + i))
        if mode == "turned":
            exif = Image.Exif()
            exif[0x0112] = 6  # a quarter turn: 48 high and 32 wide
            return {"bytes": encoded(image, "jpeg", exif=exif), "path": None}
        return {"bytes": encoded(image.convert(mode), "tiff" if mode == "CMYK" else "png"), "path": None}

    root = lerobot(tmp_path / "d", version, cell=cell)
    (root / "meta/stats.json").write_text("{}")
    height, width, channels = (
        (48, 32, 3) if mode == "turned" else (32, 48, len(Image.new(mode, (1, 1)).getbands()))
    )
    want = f"images must be [h, w, c] = [32, 48, 3] as LeRobot reads them, got {[height, width, channels]}"
    assert want in refused(root, lam, tmp_path / "out")
    found = json.loads(cli("check-data", root, "--json", "--max-frames", "0").stdout)
    assert any(want in line for line in found["warnings"])
    written(root, lam, tmp_path / "file", "--output", "file")


def test_what_lerobot_raises_is_one_sentence(tmp_path):
    from latentact.data.lerobot.verify import verify_dataset

    root = lerobot(tmp_path / "d", 3)
    on_rows("episode_index", put(3, 0.5, float))(root)
    with pytest.raises(UserError, match=r"LeRobot cannot read what was written \(.*0\.5.*\); mend it\."):
        verify_dataset(root, "mend it")


def test_missing_texts_of_tasks_become_those_of_the_list(tmp_path, lam):
    root = lerobot(tmp_path / "d", 2)
    (root / "meta/tasks.jsonl").unlink()
    write_lines(root / "meta/episodes.jsonl", [{"episode_index": e, "tasks": f"task {e}"} for e in (0, 1)])
    with lerobot_dataset(written(root, lam, tmp_path / "out"), tmp_path) as read:
        assert [read[0]["task"], read[13]["task"]] == ["task 0", "task 1"]


def test_numbers_of_the_tables_are_kept(tmp_path, lam):
    root = lerobot(
        tmp_path / "d",
        2,
        columns={ACTION: (floats(2), lambda e, n: [[float(i), float(e)] for i in range(n)])},
    )
    out = written(root, lam, tmp_path / "out")
    table = pa.concat_tables([pq.read_table(file) for file in sorted((out / "data").rglob("*.parquet"))])
    assert table[ACTION].to_pylist() == [[float(i), float(e)] for e, n in enumerate((8, 6)) for i in range(n)]
    read = open_store(DataConfig(path=str(out), resolution=32))
    assert read.column(TOKENS).shape == (14, 4)
    assert numbered(0).shape == (HEIGHT, WIDTH, 3)


# --- numbers that are none, through training


@pytest.mark.parametrize("name", [STATE, ACTION])
def test_training_on_numbers_that_are_none_ends_before_it_starts_or_leaves_them_out(tmp_path, name):
    def values(e, n):
        return [[float("nan") if i == 3 else i / n, 0.5] for i in range(n)]

    root = lerobot(tmp_path / "d", 2, lengths=(12,) * 4, cell=image_cell, columns={name: (floats(2), values)})
    more = ("labeled_episodes=3", "lam.action_weight=1") if name == ACTION else ()
    short = ("training.steps=2", "held_out=0.25", "frame_gap_s=0.1", *more)
    command = ("train-lam", *TINY_LAM, f"data.path={root}", f"out={tmp_path / 'run'}", *short)
    done = cli(*command)
    assert done.returncode == 2, done.stderr
    message = done.stderr.splitlines()[-1]
    assert re.search(
        rf"column {name}: \d rows are missing, NaN or infinite, the first is row 3 of episode", message
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/model.safetensors").exists()
    done = cli(*command, "data.drop_nonfinite=true")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/model.safetensors").exists()


# --- tables and metadata that LeRobot alone cannot open, or not in every row


@EITHER
def test_columns_that_the_metadata_does_not_name_are_left_out(tmp_path, lam, version):
    root = lerobot(tmp_path / "d", version, columns={"unlisted": (None, lambda e, n: list(range(n)))})
    found = json.loads(cli("check-data", root, "--json", "--max-frames", "0").stdout)
    assert "column unlisted is not in meta/info.json and is ignored" in found["warnings"]
    shown, tokens = opened(written(root, lam, tmp_path / "out"), tmp_path)
    assert shown == ROWS
    np.testing.assert_allclose(tokens, tokens_of(lam, store(root).frames, (8, 6)), atol=1e-5)


@EITHER
def test_missing_numbers_of_the_tables_are_nan_in_every_row_that_lerobot_reads(tmp_path, lam, version):
    def values(e, n):
        return pa.array([None, [1.0, None], *[[float(i), 2.0] for i in range(2, n)]], pa.list_(pa.float32()))

    columns = {
        ACTION: (floats(2), values),
        "reward": (floats(1), lambda e, n: pa.array([0.5, None] * (n // 2), pa.float32())),
    }
    out = written(lerobot(tmp_path / "d", version, columns=columns), lam, tmp_path / "out")
    with lerobot_dataset(out, tmp_path) as read:
        rows = [read[row] for row in range(len(read))]
    nan = float("nan")
    want = [[nan, nan], [1, nan], [2, 2], [3, 2]]
    np.testing.assert_array_equal(np.stack([row[ACTION].numpy() for row in rows])[:4], want)
    np.testing.assert_array_equal([float(row["reward"]) for row in rows], [0.5, nan] * 7)


@EITHER
def test_whole_numbers_that_are_missing_are_refused_beforehand(tmp_path, lam, version):
    flag = {"dtype": "int64", "shape": [1], "names": None}
    root = lerobot(
        tmp_path / "d", version, columns={"flag": (flag, lambda e, n: pa.array([1, None] * (n // 2)))}
    )
    want = "column flag of int64 must have a value in every row, got none in row 1"
    assert want in refused(root, lam, tmp_path / "out")
    found = json.loads(cli("check-data", root, "--json", "--max-frames", "0").stdout)
    assert any(want in line for line in found["warnings"])


@EITHER
def test_rows_without_their_number_have_tokens_in_a_file(tmp_path, lam, version):
    root = change_tables(lerobot(tmp_path / "d", version), lambda t: t.drop_columns(["frame_index"]))
    out = written(root, lam, tmp_path / "out", "--output", "file")
    arrays = load_file(out / "lam_tokens.safetensors")
    assert arrays["episode_index"].tolist() == [0] * 8 + [1] * 6
    assert arrays["frame_index"].tolist() == [*range(8), *range(6)]
    if version == 3:
        assert "must have the column frame_index" in refused(root, lam, tmp_path / "column")


def test_statistics_that_are_nan_and_a_byte_order_mark(tmp_path, lam):
    root = lerobot(tmp_path / "d", 3)
    (root / "meta/stats.json").write_text('{"action": {"mean": [NaN, 1.0], "count": [14]}}')
    info = root / "meta/info.json"
    info.write_bytes(b"\xef\xbb\xbf" + info.read_bytes())
    out = written(root, lam, tmp_path / "out")
    assert opened(out, tmp_path)[0] == ROWS
    assert np.isnan(json.loads((out / "meta/stats.json").read_text())["action"]["mean"][0])


@EITHER
def test_a_dataset_whose_name_is_not_utf8(tmp_path, lam, version):
    root = os.fsencode(tmp_path) + b"/caf\xe9"
    os.rename(lerobot(tmp_path / "d", version, cell=image_cell), root)
    out = written(os.fsdecode(root), lam, tmp_path / "out")
    assert opened(out, tmp_path)[0] == ROWS


def test_arrays_cannot_become_rows(tmp_path, lam, blocks):
    assert "must be a LeRobot dataset or a folder of videos" in refused(blocks, lam, tmp_path / "out")
