"""`latentact check-data`: what readers refuse, skip or repair is found beforehand, and written as text, JSON
or a page."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conftest import cli, latentact
from latentact.data.check_frames import still_spans
from latentact.data.decode.video import decode, probe
from wild import STATE, TOP, change_tables, lerobot, numbered, turn, with_column, write_video


def checked(path: Path, *flags: str) -> dict[str, Any]:
    done = cli("check-data", path, "--json", *flags)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["usable"] else 2)
    return found


def complete(path: Path) -> Path:
    features = json.loads((path / "meta/info.json").read_text())["features"]
    (path / "meta/stats.json").write_text(json.dumps({name: {} for name in features}))
    return path


def warned(found: dict[str, Any], pattern: str) -> bool:
    return any(re.search(pattern, line) for line in found["warnings"])


def test_a_sound_dataset_is_ready(tmp_path):
    found = checked(complete(lerobot(tmp_path / "d", 3)))
    assert found["verdict"] == "Ready: 2 episodes, 14 frames at 10 fps."
    assert found["warnings"] == []
    assert found["kind"] == "LeRobot v3.0"
    assert found["clocks"] == {"regular": 2}
    assert found["tasks"] == ["push"]
    assert found["actions"] == "2 numbers"
    assert found["decoded_frames"] == 14
    (camera,) = found["cameras"]
    assert (camera["key"], camera["codec"], camera["size"]) == (TOP, ["h264"], ["48x32"])
    assert found["columns"][STATE] == {"shape": [2], "rows": 14, "nonfinite": 0}


def test_every_camera_is_checked(tmp_path):
    keys = ("observation.images.left", "observation.images.right")
    found = checked(lerobot(tmp_path / "d", 2, cameras=keys))
    assert [camera["key"] for camera in found["cameras"]] == list(keys)
    assert checked(tmp_path / "d", "--camera", keys[1])["cameras"][0]["key"] == keys[1]


CLOCKS = [
    ("offset", lambda e, n: 1.0 + np.arange(n) / 10, {"video_frames": lambda e, n: n + 10}, ""),
    (
        "gaps",
        lambda e, n: np.r_[np.arange(4), np.arange(6, n + 2)] / 10,
        {"video_frames": lambda e, n: n + 2},
        "gaps",
    ),
    ("jitter", lambda e, n: np.arange(n) / 10 + 0.01 * (np.arange(n) % 2), {}, "up to 10 ms off"),
]


@pytest.mark.parametrize(("kind", "times", "more", "warning"), CLOCKS)
def test_clocks_that_are_read(tmp_path, kind, times, more, warning):
    found = checked(lerobot(tmp_path / "d", 2, times=times, **more))
    assert found["clocks"] == {kind: 2}
    assert found["unreadable"] == {}
    assert warned(found, warning) == bool(warning)


IMPOSSIBLE = {
    "repeats": lambda e, n: np.full(n, 0.5),
    "begins again": lambda e, n: np.arange(n) % 4 / 10,
    "not finite": lambda e, n: np.where(np.arange(n) == 2, np.nan, np.arange(n) / 10),
    "milliseconds": lambda e, n: 100.0 * np.arange(n),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_clocks_that_are_refused_are_found_without_decoding(tmp_path, kind):
    found = checked(lerobot(tmp_path / "d", 2, times=IMPOSSIBLE[kind]), "--max-frames", "0")
    assert len(found["unreadable"]) == 2
    assert all(re.search(r"column timestamp.* row \d", reason) for reason in found["unreadable"].values())
    assert found["decoded_frames"] == 0


def test_one_episode_too_short_for_its_table(tmp_path):
    data = lerobot(tmp_path / "d", 2, video_frames=lambda e, n: n if e else 5)
    found = checked(data, "--max-frames", "0")
    assert list(found["unreadable"].values()) == [
        "column timestamp, row 5 of 8: it is at 0.5 s and the last frame of its video at 0.4 s"
    ]


def test_unreadable_episodes_do_not_count(tmp_path):
    data = lerobot(tmp_path / "d", 2, video_frames=lambda e, n: n if e else 5)
    found = checked(data)
    assert found["verdict"] == "Usable with care (1 warning): 1 episodes, 6 frames at 10 fps."
    assert warned(found, "unreadable files and episodes, which are left out: 1, such as")
    clock = lerobot(tmp_path / "unix", 2, times=lambda e, n: pa.array(1.7e9 + np.arange(n) / 10))
    found = checked(clock)
    assert not found["usable"]
    assert found["verdict"].startswith("Not usable: ")


def test_what_a_lerobot_dataset_cannot_become(tmp_path):
    late = lerobot(tmp_path / "late", 3, times=lambda e, n: np.arange(n) / 10 + 0.01)
    found = checked(late, "--max-frames", "0")
    assert warned(found, "rows must be within LeRobot's tolerance of 0.0001 s of .* row 0 of episode 0")
    assert warned(found, f"meta/stats.json has no statistics of {TOP}, {STATE}, action, which LeRobot needs")
    for number, size in enumerate([(32, 48), (48, 64)]):
        write_video(tmp_path / f"v/{number}.mp4", 4, size=size)
    assert warned(checked(tmp_path / "v"), "videos of different sizes: 48x32, 64x48")


def test_columns_with_missing_and_infinite_numbers(tmp_path):
    data = lerobot(tmp_path / "d", 2)
    values = [[np.inf, 0.0] if i == 3 else None if i == 5 else [0.0, 0.0] for i in range(8)]
    change_tables(data, lambda t: with_column(t, STATE, pa.array(values[: len(t)], pa.list_(pa.float32()))))
    found = checked(data)
    assert found["columns"][STATE] == {"shape": [2], "rows": 14, "nonfinite": 4, "first": 3}
    assert warned(found, r"column observation.state: 4 of 14 rows .* row 3; drop them with --drop-nonfinite")
    assert found["verdict"].startswith("Usable with care (1 warning)")


def test_a_folder_of_videos(tmp_path):
    folder = tmp_path / "v"
    moving = [numbered(i) for i in range(12)]
    write_video(folder / "a.mp4", moving)
    write_video(folder / "same/b.mp4", moving)
    turn(write_video(folder / "turned.mp4", 6, start=40), 0, 1, -1, 0)
    write_video(folder / "still.mp4", [*moving[:3], *[moving[3]] * 20, *moving[4:8]])
    write_video(folder / "varies.mp4", 8, start=60, millis=[0, 33, 66, 99, 200, 300, 400, 500])
    (folder / "notes.txt").write_text("notes")
    (folder / ".hidden.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "around").symlink_to(folder)
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:400])
    found = checked(folder)
    assert found["kind"] == "folder of videos"
    assert found["episodes"]["count"] == 5
    assert list(found["unreadable"]) == ["cut.mp4"]
    assert found["skipped"] == {
        "notes.txt": "unsupported suffix '.txt'",
        ".hidden.mp4": "hidden",
        "gone.mp4": "a dangling link",
        "around": "a link to a parent folder",
    }
    assert found["duplicates"] == [["a.mp4", "same/b.mp4"]]
    (span,) = found["still"]
    assert (span["episode"], round(span["from_s"], 3), round(span["to_s"], 3)) == ("still.mp4", 0.3, 2.2)
    assert found["rate"]["varies"]
    assert warned(found, "videos rotated or mirrored by a display matrix: 1, such as turned.mp4")
    assert warned(found, "varies.mp4: the frame rate varies")


def test_a_video_whose_frames_change_size(tmp_path):
    millis = [100 * i for i in range(12)]
    parts = [
        write_video(tmp_path / "a.ts", 6, millis=millis[:6], options={"bf": "0"}),
        write_video(tmp_path / "b.ts", 6, start=6, millis=millis[6:], size=(64, 96), options={"bf": "0"}),
    ]
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    found = checked(tmp_path / "v")
    assert warned(found, r"episodes whose frames change size: 1, such as a.ts \(48x32, 96x64\); precompute")


def test_videos_that_cannot_become_rows(tmp_path):
    write_video(tmp_path / "mkv/a.mkv", 6)
    assert warned(checked(tmp_path / "mkv"), "videos other than mp4: 1, such as a.mkv; precompute --output")
    write_video(tmp_path / "late/a.mp4", 6, millis=[500 + 100 * i for i in range(6)])
    assert warned(
        checked(tmp_path / "late"), "frames that are not at row / fps: 1, such as a.mp4; precompute"
    )
    write_video(tmp_path / "ntsc/a.mp4", 6, fps=29.97)
    assert warned(checked(tmp_path / "ntsc"), "29.97 frames per second is not an integer; precompute")
    write_video(tmp_path / "good/a.mp4", 6)
    assert checked(tmp_path / "good")["verdict"].startswith("Ready")


def test_still_spans_by_hand():
    changes = np.array([5, 0, 0, 0, 5, 0, 5.0])
    times = np.array([0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
    assert still_spans(changes, times) == [(0.5, 2.0)]  # half a second at the end is too short
    assert still_spans(np.zeros(0), times[:1]) == []


def test_frames_to_decode_are_bounded(tmp_path):
    data = lerobot(tmp_path / "d", 3, lengths=(8,) * 6)
    assert checked(data, "--max-frames", "20")["decoded_frames"] == 16
    assert checked(data, "--max-frames", "1")["decoded_frames"] == 8  # one episode at least
    done = cli("check-data", data, "--max-frames", "-1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_page_holds_a_contact_sheet(tmp_path):
    pytest.importorskip("plotly")
    data, page = complete(lerobot(tmp_path / "d", 3)), tmp_path / "check.html"
    done = cli("check-data", data, "--html", page)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "Ready: 2 episodes, 14 frames at 10 fps."
    text = page.read_text()
    assert text.count('alt="frames of') == 2  # one strip of three frames for each episode
    assert all(word in text for word in ("Contact sheet", "BT.601", STATE, "Ready: 2 episodes"))


def test_npz_episodes(blocks):
    found = checked(blocks)
    assert (found["kind"], found["episodes"]["count"], found["actions"]) == ("npz episodes", 8, "4 classes")
    assert warned(found, "npz episodes cannot become a LeRobot dataset; precompute --output column rejects")


def test_videos_without_a_transition_and_with_frames_that_do_not_decode(tmp_path):
    folder = tmp_path / "v"
    write_video(folder / "one.mp4", 1)
    whole = write_video(folder / "whole.ts", 30, options={"g": "8", "bf": "3"}).read_bytes()
    start = len(whole) // 188 // 2 * 188  # packets have 188 bytes: a recording that began between key frames
    (folder / "late.ts").write_bytes(whole[start:])
    found = checked(folder)
    assert warned(found, r"episodes of one frame, which have no transitions: 1, such as one\.mp4")
    shown = len(list(decode(folder / "late.ts")))
    held = probe(folder / "late.ts").frames
    assert held > shown > 0
    assert warned(
        found, rf"a different number of frames than they contain: 1, such as late\.ts \({shown} of {held}\)"
    )


def test_unreadable_episodes_that_precompute_refuses(tmp_path):
    late = checked(
        complete(lerobot(tmp_path / "v3", 3, times=lambda e, n: np.arange(n) / 10 - 0.1 * (e == 0)))
    )
    assert warned(late, "left out: 1, .* precompute --output column keeps their rows and rejects those")
    two = lerobot(tmp_path / "v2", 2, cameras=(TOP, "observation.images.wrist"))
    (two / "videos/chunk-000/observation.images.wrist/episode_000000.mp4").write_bytes(b"not a video")
    assert warned(checked(two), "precompute --output column rejects an episode of which another camera is")


@pytest.mark.parametrize("kind", ["nothing", "empty", "broken info", "no camera", "all damaged"])
def test_what_cannot_be_used(tmp_path, kind):
    path = tmp_path / "d"
    if kind == "empty":
        path.mkdir()
    elif kind == "broken info":
        (lerobot(path, 2) / "meta/info.json").write_text('{"codebase_version": "v2.1", "fps": "ten"}')
    elif kind == "no camera":
        lerobot(path, 2, cameras=())
    elif kind == "all damaged":
        path.mkdir()
        (path / "a.mp4").write_text("not a video")
    done = cli("check-data", path)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("Not usable: ")
    assert "Traceback" not in done.stderr
    assert checked(path)["errors"]


def test_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / "v"
    write_video(folder / "a.mp4", 6)
    os.rename(folder / "a.mp4", os.fsencode(folder) + b"/caf\xe9.mp4")
    found = checked(folder)
    assert found["episodes"]["count"] == 1
    assert found["unreadable"] == {}


@pytest.mark.slow
def test_metadata_of_a_hundred_thousand_frames_takes_seconds(tmp_path):
    data = lerobot(tmp_path / "d", 3, lengths=(8,), cell=lambda e, i: {"bytes": b"", "path": None})
    rows, episodes = 100_000, 100
    index = np.arange(rows)

    def grow(table: pa.Table) -> pa.Table:
        every = {
            "timestamp": (index % 1000 / 10).astype(np.float32),
            "frame_index": index % 1000,
            "episode_index": index // 1000,
            "index": index,
            "task_index": np.zeros(rows, np.int64),
        }
        rest = {
            name: table[name].take(pa.array(index % len(table)))
            for name in table.column_names
            if name not in every
        }
        return pa.table({**rest, **every})

    change_tables(data, grow)
    listed = {
        "episode_index": np.arange(episodes),
        "tasks": [["push"]] * episodes,
        "length": [1000] * episodes,
    }
    change_tables(data, lambda _: pa.table(listed), "meta/episodes")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = latentact("check-data", data, "--max-frames", "0", "--json")  # a process without type checks
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout)["episodes"]["frames"] == rows
    assert after.ru_utime - before.ru_utime < 10  # whatever else the machine does
