"""What LeRobot opens and few datasets have: episodes over several files, tasks counted from the end, 16-bit
images, times that contradict the video; `LeRobotDataset` says what is right."""

from __future__ import annotations

import json

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import TINY_LAM, cli
from latentact.data.decode.video import decode
from latentact.data.digest import Memo
from latentact.data.format import open_source
from latentact.errors import UserError
from latentact.io.tensors import load_tensors
from wild import (
    HEIGHT,
    STATE,
    TOP,
    WIDTH,
    actions,
    change_info,
    change_tables,
    encoded,
    image_cell,
    lerobot,
    lerobot_dataset,
    lerobot_frames,
    numbers,
    small_lam,
    state_of,
    store,
    with_column,
    write_video,
)

pytest.importorskip("lerobot")
DatasetGenerationError = pytest.importorskip("datasets.exceptions").DatasetGenerationError
IMAGES = {"cell": image_cell}


def notes(root, tmp_path):
    return open_source(root, "", Memo(tmp_path / "memo", root)).notes


def tasks(read):
    return [read.task_texts[n] for n in read.task]


def lerobot_tasks(root, cache_dir):
    with lerobot_dataset(root, cache_dir) as read:
        return [read[row]["task"] for row in range(len(read))]


# --- episodes over several data files


def spread(root, *cuts):
    """Write the rows of the only table into several files, which end before these rows."""
    whole = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(whole)
    for n, (begin, end) in enumerate(zip((0, *cuts), (*cuts, len(table)), strict=True)):
        pq.write_table(
            table.slice(begin, end - begin), whole.with_name(f"file-{n:03d}.parquet"), row_group_size=3
        )
    return root


CUTS = {
    "inside_one": (5,),
    "inside_both": (3, 10),
    "between": (8,),
    "a_row_each": tuple(range(1, 14)),
}


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("images", [True, False], ids=["images", "videos"])
def test_an_episode_over_several_files_is_read_as_lerobot_shows_it(tmp_path, kind, images):
    whole = store(lerobot(tmp_path / "whole", 3, **(IMAGES if images else {})))
    root = spread(lerobot(tmp_path / "d", 3, **(IMAGES if images else {})), *CUTS[kind])
    read = store(root)
    assert read.lengths.tolist() == [8, 6]
    np.testing.assert_array_equal(read.frames, lerobot_frames(root, tmp_path / "hf"))
    np.testing.assert_array_equal(read.state, whole.state)
    np.testing.assert_array_equal(actions(read, [0, 1]), actions(whole, [0, 1]))
    assert tasks(read) == lerobot_tasks(root, tmp_path / "hf")
    assert notes(root, tmp_path) == []


def test_a_file_without_rows_is_passed_over_and_refused_as_columns(tmp_path):
    root = spread(lerobot(tmp_path / "d", 3, **IMAGES), 5, 5, 14)
    assert numbers(store(root).frames) == [*range(8), *range(20, 26)]
    with pytest.raises(DatasetGenerationError), lerobot_dataset(root, tmp_path / "hf"):
        pass
    given = ("--dataset-root", root, "--lam-model-path", small_lam(tmp_path / "lam"))
    done = cli("precompute", *given, "--output-dir", tmp_path / "out")
    assert done.returncode == 2
    assert "data/chunk-000/file-001.parquet must have rows, got none" in done.stderr
    assert "file-003.parquet must have rows, got none" in cli("check-data", root).stdout


def test_images_of_an_episode_over_two_files_that_change_are_read_again(tmp_path):
    root = spread(lerobot(tmp_path / "d", 3, **IMAGES), 5)
    assert numbers(store(root).frames[:8]) == list(range(8))
    cells = [image_cell(0, 40 + i) for i in range(9)]
    change_tables(root, lambda t: with_column(t, TOP, cells), "data/chunk-000/file-001.parquet")
    assert numbers(store(root).frames[:8]) == [0, 1, 2, 3, 4, 40, 41, 42]


@pytest.mark.parametrize("images", [True, False], ids=["images", "videos"])
def test_an_episode_over_several_files_gets_its_tokens(tmp_path, images):
    lam = small_lam(tmp_path / "lam")
    tokens = []
    for name, cuts in (("whole", ()), ("d", (5, 10))):
        root = spread(lerobot(tmp_path / name, 3, **(IMAGES if images else {})), *cuts)
        out = tmp_path / f"{name}_tokens"
        done = cli("precompute", "--dataset-root", root, "--lam-model-path", lam, "--output-dir", out)
        assert done.returncode == 0, done.stderr
        with lerobot_dataset(out, tmp_path / f"hf_{name}") as read:
            tokens.append(np.stack([read[row]["observation.lam_tokens"].numpy() for row in range(14)]))
    assert len(list((out / "data").rglob("*.parquet"))) == 3
    np.testing.assert_array_equal(*tokens)


def test_rows_of_an_episode_apart_over_files_are_one_sentence(tmp_path):
    root = spread(lerobot(tmp_path / "d", 3, **IMAGES), 4, 8)
    (root / "data/chunk-000/file-001.parquet").rename(root / "data/chunk-000/file-009.parquet")
    with pytest.raises(UserError, match=r"file-009.parquet must hold the rows of episode 0 together"):
        store(root)


# --- videos with several streams, depth maps


@pytest.mark.parametrize("version", [2, 3])
def test_a_second_stream_that_only_some_decoders_show_is_refused_as_columns(tmp_path, version):
    root = lerobot(tmp_path / "d", version, lengths=(8,))
    video = next(root.rglob("*.mp4"))
    other = write_video(tmp_path / "other.mp4", 8, start=100)
    with av.open(str(tmp_path / "b.mp4"), "w") as out:
        sources = [av.open(str(file)) for file in (video, other)]
        streams = [out.add_stream_from_template(source.streams.video[0]) for source in sources]
        streams[0].disposition, streams[1].disposition = 0, 1  # FFmpeg chooses the default one
        for source, stream in zip(sources, streams, strict=True):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
            source.close()
    (tmp_path / "b.mp4").replace(video)
    assert numbers(store(root).frames) == list(range(100, 108))  # as FFmpeg, and LeRobot with torchcodec
    given = ("--dataset-root", root, "--lam-model-path", small_lam(tmp_path / "lam"))
    done = cli("precompute", *given, "--output-dir", tmp_path / "out")
    assert done.returncode == 2
    assert "has 2 video streams, of which LeRobot's decoders show different ones" in done.stderr
    assert "another stream than the first: 1" in cli("check-data", root).stdout


@pytest.mark.parametrize("version", [2, 3])
def test_a_depth_map_is_no_camera_and_says_so(tmp_path, version):
    for cameras in ((TOP,), (TOP, "observation.images.depth")):
        root = lerobot(tmp_path / f"d{len(cameras)}", version, cameras=cameras)
        features = json.loads((root / "meta/info.json").read_text())["features"]
        features[cameras[-1]]["info"] = {"is_depth_map": True}
        change_info(root, features=features)
        with pytest.raises(UserError, match=f"{cameras[-1]} is a depth map"):
            store(root, camera=cameras[-1])
    assert numbers(store(root).frames) == [*range(8), *range(20, 26)]


@pytest.mark.parametrize("version", [2, 3])
def test_pixels_in_a_column_of_numbers_are_no_camera_and_say_so(tmp_path, version):
    pixels = {"dtype": "uint8", "shape": [HEIGHT, WIDTH, 3]}
    root = lerobot(tmp_path / "d", version, columns={"observation.images.rgb": (pixels, None)}, **IMAGES)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    change_info(root, features={name: feature for name, feature in features.items() if name != TOP})
    with pytest.raises(UserError, match=r"has no camera, as observation.images.rgb has the dtype uint8"):
        store(root)


@pytest.mark.parametrize("dtype", ["Float32", "<f4", "complex64", "object", "datetime64"])
def test_types_that_are_no_numbers_are_named(tmp_path, dtype):
    root = lerobot(
        tmp_path / "d", 3, columns={STATE: ({"dtype": dtype, "shape": [2], "names": None}, state_of)}
    )
    with pytest.raises(UserError, match=f"features.{STATE}.dtype must be a numeric type, .*got '{dtype}'"):
        _ = store(root).state


# --- tasks and metadata


TASKS = {"last": [-1] * 14, "each": [-1, -2, -3] * 4 + [0, 1], "mixed": [2, -3, 1, -1] * 3 + [0, -2]}


@pytest.mark.parametrize("kind", TASKS)
def test_a_negative_task_index_counts_from_the_end_as_in_lerobot(tmp_path, kind):
    root = lerobot(tmp_path / "d", 3, texts=("push", "pull", "lift"), **IMAGES)
    change_tables(root, lambda t: with_column(t, "task_index", TASKS[kind]))
    read = store(root)
    assert tasks(read) == lerobot_tasks(root, tmp_path / "hf")
    assert tasks(read) == [("push", "pull", "lift")[n] for n in TASKS[kind]]


def test_an_empty_task_is_no_task_as_in_lerobot(tmp_path):
    root = lerobot(tmp_path / "d", 3, texts=("", "lift"), **IMAGES)
    change_tables(root, lambda t: with_column(t, "task_index", [0, 1] * 7))
    assert tasks(store(root)) == lerobot_tasks(root, tmp_path / "hf") == ["", "lift"] * 7
    assert notes(root, tmp_path) == []


@pytest.mark.parametrize(("version", "value"), [(2, -1), (3, -2), (3, 1)])
def test_a_task_index_that_no_table_has_is_noted(tmp_path, version, value):
    root = lerobot(tmp_path / "d", version, **IMAGES)
    change_tables(root, lambda t: with_column(t, "task_index", [value] * len(t)))
    assert tasks(store(root)) == ["push"] * 14
    assert f"column task_index: {value} is not in the table of tasks" in notes(root, tmp_path)[0]


@pytest.mark.parametrize("value", [["so101", "so101"], {"left": "so100"}, 7, ""])
@pytest.mark.parametrize("version", [2, 3])
def test_robots_and_splits_of_any_form_are_kept(tmp_path, value, version):
    root = change_info(lerobot(tmp_path / "d", version, **IMAGES), robot_type=value, splits=value)
    assert numbers(store(root).frames) == [*range(8), *range(20, 26)]
    out = tmp_path / "out"
    lam = small_lam(tmp_path / "lam")
    done = cli("precompute", "--dataset-root", root, "--lam-model-path", lam, "--output-dir", out)
    assert done.returncode == 0, done.stderr
    with lerobot_dataset(out, tmp_path / "hf") as read:
        assert read.meta.robot_type == value


# --- 16-bit images


def depth(i):
    """Return a depth image in millimeters that uses all 16 bits."""
    return np.random.default_rng(i).integers(0, 1 << 16, (HEIGHT, WIDTH), dtype=np.uint16)


def big_endian(values):
    return Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())


DEEP = {
    "png": lambda i: encoded(Image.fromarray(depth(i))),
    "tiff": lambda i: encoded(Image.fromarray(depth(i)), "tiff"),
    "big_endian_tiff": lambda i: encoded(big_endian(depth(i)), "tiff"),
}


def gray16_video(path, frames):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "gray16le"
        for n, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(values, format="gray16le")
            frame.pts = n
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("kind", DEEP)
def test_16_bit_images_are_shown_as_a_video_of_lerobots_values(tmp_path, kind):
    shape = {"shape": (HEIGHT, WIDTH, 1), "lengths": (3,)}
    root = lerobot(tmp_path / "d", 3, cell=lambda e, i: {"bytes": DEEP[kind](i), "path": None}, **shape)
    with lerobot_dataset(root, tmp_path / "hf") as read:
        values = [read[row][TOP][0].numpy().astype(np.uint16) for row in range(3)]
    np.testing.assert_array_equal(values, [depth(i) for i in range(3)])
    frames = store(root).frames
    shown = [frame for _, frame in decode(gray16_video(tmp_path / "depth.mkv", values))]
    np.testing.assert_array_equal(frames, shown)
    assert np.abs(frames[..., 0] - np.stack(values) / 257).max() <= 1.5
    found = cli("check-data", root)
    assert "of images of 16 bits (I;16" in found.stdout


@pytest.mark.parametrize("version", [2, 3])
def test_16_bit_images_get_tokens(tmp_path, version):
    shape = {"shape": (HEIGHT, WIDTH, 1), "lengths": (8,)}
    root = lerobot(
        tmp_path / "d", version, cell=lambda e, i: {"bytes": DEEP["png"](i), "path": None}, **shape
    )
    given = ("--dataset-root", root, "--lam-model-path", small_lam(tmp_path / "lam"))
    done = cli("precompute", *given, "--output-dir", tmp_path / "out")
    if version == 2:  # LeRobot's version 3 has no gray images of version 2
        assert done.returncode == 2
        assert "images must be [h, w, c] = [32, 48, 3] as LeRobot reads them, got [32, 48, 1]" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
    done = cli("precompute", *given, "--output-dir", tmp_path / "file", "--output", "file")
    assert done.returncode == 0, done.stderr
    assert load_tensors(tmp_path / "file/lam_tokens.safetensors")["valid"].sum() == 6


# --- times that contradict the video, found before a frame is decoded


def place(name, episode, value):
    """Return a change of an episode's time in `meta/episodes`."""
    column = f"videos/{TOP}/{name}"

    def change(table):
        values = table[column].to_pylist()
        values[episode] = value
        return with_column(table, column, values)

    return change


LOST = {
    "after_the_video": (place("from_timestamp", 1, 50.0), "its video has no frame near 50 s"),
    "before_the_video": (place("from_timestamp", 0, -1.0), "its video has no frame near -1 s"),
    "between_frames": (place("from_timestamp", 1, 0.85), "its video has no frame at 0.85 s"),
    "past_the_end": (place("from_timestamp", 1, 1.0), "row 4 of 6: it is at 1.4 s and the last frame"),
}


def commands(root, lam, out):
    yield "label", ("label", "--lam", lam, "--data", root, "--strict", "--out", out)
    yield "cache", ("cache", "--data", root, "--resolution", "32", "--strict")
    yield "train-lam", ("train-lam", *TINY_LAM, f"data.path={root}", "data.strict=true", f"out={out}")
    yield "precompute", ("precompute", "--dataset-root", root, "--lam-model-path", lam, "--output-dir", out)


@pytest.mark.parametrize("kind", LOST)
def test_impossible_times_are_found_before_a_frame_is_decoded(tmp_path, monkeypatch, kind):
    def never(*_):
        raise AssertionError("a frame was decoded")

    monkeypatch.setattr("latentact.data.lerobot.source.decode", never)
    change, words = LOST[kind]
    root = change_tables(lerobot(tmp_path / "d", 3), change, "meta/episodes")
    lam, out = small_lam(tmp_path / "lam"), tmp_path / "out"
    for name, command in commands(root, lam, out):
        done = cli(*command)
        assert done.returncode == 2, done.stderr
        said = done.stderr if name != "precompute" else cli("check-data", root, "--max-frames", "0").stdout
        assert words in said, name
        assert not out.exists()
    assert "rows must be within LeRobot's tolerance of 0.0001 s" in done.stderr


@pytest.mark.parametrize("kind", LOST)
def test_other_episodes_are_read_where_one_has_impossible_times(tmp_path, kind, caplog):
    root = change_tables(lerobot(tmp_path / "d", 3), LOST[kind][0], "meta/episodes")
    lost = 0 if kind == "before_the_video" else 1
    assert numbers(store(root).frames) == [list(range(20, 26)), list(range(8))][lost]
    assert f"skipped 1 unreadable: episode {lost}" in caplog.text
    assert caplog.text.count("skipped") == 1


SHOWN = {
    "ends_before_it_begins": (place("to_timestamp", 0, -0.5), "to_timestamp of episode 0 must be 0.8 s"),
    "ends_late": (place("to_timestamp", 1, 99.0), "to_timestamp of episode 1 must be 1.4 s"),
    "no_end": (place("to_timestamp", 1, None), "to_timestamp of episode 1 must be 1.4 s"),
    "shared": (place("from_timestamp", 1, 0.5), "episodes 0 and 1 share frames of videos/"),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_times_that_lerobot_does_not_mind_are_noted_and_read_as_it_shows_them(tmp_path, kind):
    change, words = SHOWN[kind]
    root = change_tables(lerobot(tmp_path / "d", 3), change, "meta/episodes")
    read = store(root)
    np.testing.assert_array_equal(read.frames, lerobot_frames(root, tmp_path / "hf"))
    assert any(words in note for note in notes(root, tmp_path))
    assert words in cli("check-data", root).stdout
