"""`latentact precompute` on folders of videos: LeRobot shows the frames that the tokens belong to."""

import json
import shutil

import numpy as np
import pytest

from conftest import cli
from wild import (
    TOP,
    ffmpeg_frames,
    lerobot,
    numbers,
    small_lam,
    store,
    trim,
    turn,
    write_video,
)
from wild_rows import (
    EITHER,
    ROWS,
    VIDEO,
    opened,
    precompute,
    refused,
    tokens_of,
    written,
)

pytest.importorskip("lerobot")


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    """A LAM of random weights that looks two frames ahead at 10 fps."""
    return small_lam(tmp_path_factory.mktemp("lam") / "lam")


def test_videos_become_rows(tmp_path, lam):
    write_video(tmp_path / "v/a.mp4", 8)
    write_video(tmp_path / "v/x/b.mp4", 6, start=20)
    shown, tokens = opened(written(tmp_path / "v", lam, tmp_path / "out"), tmp_path, VIDEO)
    assert shown == ROWS
    np.testing.assert_allclose(tokens, tokens_of(lam, store(tmp_path / "v").frames, (8, 6)), atol=1e-5)


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1), (0, 1, 1, 0)])
def test_turned_and_mirrored_videos_are_refused_as_columns_and_taken_as_files(tmp_path, lam, matrix):
    turn(write_video(tmp_path / "v/a.mp4", 6), *matrix)
    message = refused(tmp_path / "v", lam, tmp_path / "out")
    assert "is rotated or mirrored" in message
    assert "--output file" in message
    written(tmp_path / "v", lam, tmp_path / "out", "--output", "file")


@EITHER
def test_turned_videos_of_a_dataset_are_refused_before_anything_is_encoded(tmp_path, lam, version):
    root = lerobot(tmp_path / "d", version)
    turn(next(root.rglob("*.mp4")), 0, 1, -1, 0)
    done = precompute(root, lam, tmp_path / "out")
    assert done.returncode == 2
    assert "encoding" not in done.stderr


def test_a_turned_video_of_another_camera_is_refused(tmp_path, lam):
    root = lerobot(tmp_path / "d", 3, cameras=(TOP, f"{TOP}_2"))
    turn(next((root / f"videos/{TOP}_2").rglob("*.mp4")), 0, 1, -1, 0)
    assert "is rotated or mirrored" in refused(root, lam, tmp_path / "out", "--camera-key", TOP)


UNFIT = {
    "mkv": lambda v: write_video(v / "a.mkv", 6),
    "variable_rate": lambda v: write_video(v / "a.mp4", 8, millis=[0, 30, 60, 90, 200, 300, 400, 500]),
    "late_start": lambda v: write_video(v / "a.mp4", 6, millis=[500 + 100 * i for i in range(6)]),
    "jitter": lambda v: write_video(v / "a.mp4", 6, millis=[0, 100, 203, 300, 400, 500]),
    "odd_rate": lambda v: write_video(v / "a.mp4", 6, fps=12.5),
    "two_rates": lambda v: [write_video(v / "a.mp4", 6), write_video(v / "b.mp4", 6, fps=20)],
    "two_sizes": lambda v: [write_video(v / "a.mp4", 6), write_video(v / "b.mp4", 6, size=(48, 64))],
}


@pytest.mark.parametrize("kind", UNFIT)
def test_videos_that_cannot_be_rows_are_refused_as_columns_and_taken_as_files(tmp_path, lam, kind):
    UNFIT[kind](tmp_path / "v")
    gap = ("--frame-gap-s", "0.4")
    done = precompute(tmp_path / "v", lam, tmp_path / "out", *gap)
    assert "--output file" in refused(tmp_path / "v", lam, tmp_path / "out", *gap)
    assert kind == "late_start" or "encoding" not in done.stderr
    found = json.loads(cli("check-data", tmp_path / "v", "--json", "--max-frames", "0").stdout)
    assert found["verdict"].startswith("Usable with care")
    done = precompute(tmp_path / "v", lam, tmp_path / "out", *gap, "--output", "file")
    assert done.returncode == 0 or "error: " in done.stderr


@pytest.mark.parametrize("bframes", [0, 3])
@pytest.mark.parametrize(("keep_ms", "skip", "shown"), [(600, 0.0, range(6)), (900, 0.3, range(3, 12))])
def test_trimmed_videos_become_the_rows_that_a_player_shows(tmp_path, lam, bframes, keep_ms, skip, shown):
    path = write_video(tmp_path / "v/a.mp4", 12, options={"bf": str(bframes), "g": "12"})
    trim(path, keep_ms=keep_ms, skip=skip)
    got, tokens = opened(written(tmp_path / "v", lam, tmp_path / "out"), tmp_path, VIDEO)
    assert got == [*shown]
    np.testing.assert_allclose(tokens, tokens_of(lam, store(tmp_path / "v").frames, (len(shown),)), atol=1e-5)


def test_a_cut_without_encoding_again_becomes_rows(tmp_path, lam):
    program = shutil.which("ffmpeg")
    if program is None:
        pytest.skip("needs FFmpeg's command line; the edit lists above are of the same kind")
    import subprocess

    whole = write_video(tmp_path / "a.mp4", 24, options={"bf": "3", "g": "12"})
    (tmp_path / "v").mkdir()
    cut = [
        program,
        "-loglevel",
        "error",
        "-ss",
        "0.7",
        "-i",
        str(whole),
        "-c",
        "copy",
        str(tmp_path / "v/a.mp4"),
    ]
    subprocess.run(cut, check=True)
    frames = ffmpeg_frames(tmp_path / "v/a.mp4")
    ours = store(tmp_path / "v").frames
    assert numbers(ours) == numbers(frames) == [*range(7, 24)]
    got, _ = opened(written(tmp_path / "v", lam, tmp_path / "out"), tmp_path, VIDEO)
    assert got == [*range(7, 24)]


def test_damaged_videos_leave_nothing_behind(tmp_path, lam):
    write_video(tmp_path / "v/a.mp4", 6)
    (tmp_path / "v/b.mp4").write_bytes(b"hello")
    out = written(tmp_path / "v", lam, tmp_path / "out")
    assert list(json.loads((out / "meta/lam_tokens.json").read_text())["unreadable"]) == ["b.mp4"]
    (tmp_path / "v/a.mp4").write_bytes(b"")
    shutil.rmtree(out)
    assert "2 unreadable" in refused(tmp_path / "v", lam, out)


def test_a_first_video_without_frames_is_left_out(tmp_path, lam):
    """Its header can be read; the check of all videos before encoding must not end there."""
    for name in "abc":
        file = write_video(tmp_path / f"v/{name}.mp4", 8)
    first = file.with_name("a.mp4")
    data = bytearray(first.read_bytes())
    begin, end = data.find(b"mdat") + 4, data.find(b"moov") - 4
    assert 4 < begin < end
    data[begin:end] = bytes(end - begin)
    first.write_bytes(data)
    shown, _ = opened(written(tmp_path / "v", lam, tmp_path / "out"), tmp_path, VIDEO)
    assert len(shown) == 16
