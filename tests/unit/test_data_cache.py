import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_video import write_video

from latentact.data import build
from latentact.data.cache import DataConfig, open_store
from latentact.data.decode import pipeline
from latentact.data.format import Unreadable
from latentact.errors import UserError
from latentact.io.atomic import atomic_dir
from latentact.io.tensors import save_tensors

SHARED = Path(__file__).parents[3] / "shared" / "data"

OPEN = """
import sys, time
from latentact.data.decode import video
from latentact.data.cache import DataConfig, open_store
from latentact.data.formats.video_folder import VideoFolderSource
path, cache, delay = sys.argv[1:]
frames = VideoFolderSource.frames
def slow(self, number):
    for item in frames(self, number):
        time.sleep(float(delay))
        yield item
VideoFolderSource.frames = slow
print(open_store(DataConfig(path=path, cache_dir=cache)).digest, flush=True)
"""


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def videos(folder, count=3, frames=6, **kwargs):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        write_video(folder / f"{i:02}.mp4", [i * 20 + k * 5 for k in range(frames)], **kwargs)
    return folder


def store_of(path, cache, **kwargs):
    return open_store(DataConfig(path=str(path), cache_dir=str(cache), **kwargs))


def files(entry):
    return {f.name: f.read_bytes() for f in sorted(entry.iterdir()) if f.name != "used"}


def table_episodes(tmp_path):
    """Three episodes of 4, 3 and 5 steps, action = row."""
    done = np.zeros(12, bool)
    done[[3, 6, 11]] = True
    np.savez(
        tmp_path / "t.npz", obs=np.zeros((12, 5, 5, 2), np.uint8), action=np.arange(12), done=done, fps=10.0
    )
    return tmp_path / "t.npz"


def test_a_store_of_videos(tmp_path, cache):
    store = store_of(videos(tmp_path / "v"), cache)
    assert store.frames.shape == (18, 64, 64, 3)
    assert store.frames.dtype == np.uint8
    assert isinstance(store.frames, np.memmap)
    assert not store.frames.flags.writeable
    assert store.num_episodes == 3
    assert store.starts.tolist() == [0, 6, 12]
    assert store.lengths.tolist() == [6, 6, 6]
    assert store.episode.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert store.episode_ids == ("00.mp4", "01.mp4", "02.mp4")
    assert store.task_texts == ("",)
    assert not store.task.any()
    assert (store.fps, store.camera, store.state, store.action_space) == (10.0, "", None, None)
    np.testing.assert_allclose(store.timestamps[:6], np.arange(6) / 10)
    assert store.source_rows.tolist() == list(range(18))
    means = store.frames.reshape(18, -1).mean(1)
    np.testing.assert_allclose(means, [i * 20 + k * 5 for i in range(3) for k in range(6)], atol=3)


def test_resolution_and_rate(tmp_path, cache):
    folder = videos(tmp_path / "v", size=(48, 80))
    assert store_of(folder, cache, resolution=32).frames.shape == (18, 32, 32, 3)
    assert store_of(folder, cache, resolution=0).frames.shape == (18, 48, 80, 3)
    half = store_of(folder, cache, resolution=32, target_fps=5.0)
    assert half.lengths.tolist() == [3, 3, 3]  # 0, 0.2, 0.4 of 0 .. 0.5 s
    assert half.source_rows.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert half.fps == 5.0
    np.testing.assert_allclose(half.timestamps[:3], [0, 0.2, 0.4])


def test_columns_follow_resampling(tmp_path, cache):
    store = store_of(table_episodes(tmp_path), cache, target_fps=5.0)
    assert store.lengths.tolist() == [2, 2, 3]
    assert store.actions([0, 1, 2]).tolist() == [0, 2, 4, 6, 7, 9, 11]


def test_only_named_episodes_show_their_actions(tmp_path, cache):
    store = store_of(table_episodes(tmp_path), cache)
    assert store.actions([]).tolist() == [None] * 12
    assert store.actions([1]).tolist() == [None] * 4 + [4, 5, 6] + [None] * 5
    assert store.actions({2, 0}).tolist() == [0, 1, 2, 3, None, None, None, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="must not be an action"):
        store.column("action")
    with pytest.raises(UserError, match="must be between 0 and 2"):
        store.actions([3])
    assert store.column("done").sum() == 3


def test_plain_video_has_no_actions(tmp_path, cache):
    with pytest.raises(UserError, match="must have an `action` column"):
        store_of(videos(tmp_path / "v", 1), cache).actions([])


def test_grids_are_kept_as_they_are(tmp_path, cache):
    assert store_of(table_episodes(tmp_path), cache, resolution=64).frames.shape == (12, 5, 5, 2)


def test_the_second_open_decodes_and_digests_nothing(tmp_path, cache, monkeypatch):
    folder = videos(tmp_path / "v")
    first = store_of(folder, cache)
    for name in ("latentact.data.cache.build", "latentact.data.formats.video_folder.file_digest"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("again"))
    assert store_of(folder, cache).digest == first.digest


def test_the_key_is_made_of_content(tmp_path, cache):
    folder = videos(tmp_path / "v")
    key = store_of(folder, cache).digest
    assert store_of(shutil.copytree(folder, tmp_path / "copy"), cache).digest == key
    assert store_of(folder, cache, resolution=32).digest != key
    assert store_of(folder, cache, target_fps=5.0).digest != key
    write_video(folder / "01.mp4", [0, 1, 2])
    assert store_of(folder, cache).digest != key


def test_unreadable_files_are_skipped_by_name_and_counted(tmp_path, cache, caplog):
    folder = videos(tmp_path / "v")
    (folder / "00b.mp4").write_bytes((folder / "00.mp4").read_bytes()[:900])
    (folder / "text.mp4").write_text("hello")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        store = store_of(folder, cache)
        assert store.episode_ids == ("00.mp4", "01.mp4", "02.mp4")
        assert sorted(store.unreadable) == ["00b.mp4", "text.mp4"]
        (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert "2 unreadable: 00b.mp4 (" in message
        assert "text.mp4 (" in message
    with pytest.raises(UserError, match=r"2 unreadable: 00b.mp4 \("):
        store_of(folder, cache, strict=True)


def break_middle(monkeypatch):
    """Let the second video fail after two of its frames."""
    from latentact.data.formats.video_folder import VideoFolderSource

    frames = VideoFolderSource.frames

    def broken(self, number):
        for place, item in enumerate(frames(self, number)):
            if number == 1 and place == 2:
                raise Unreadable("bits are missing")
            yield item

    monkeypatch.setattr(VideoFolderSource, "frames", broken)


def test_damage_found_while_decoding_leaves_no_frame_behind(tmp_path, cache, monkeypatch):
    folder = videos(tmp_path / "v")
    break_middle(monkeypatch)
    monkeypatch.setattr(
        pipeline, "_CHUNK_BYTES", 1
    )  # a chunk per frame: two frames are written, then taken back
    store = store_of(folder, cache)
    assert store.episode_ids == ("00.mp4", "02.mp4")
    assert store.unreadable == {"01.mp4": "bits are missing"}
    assert len(store.frames) == 12
    assert abs(float(store.frames[6].mean()) - 40) < 3
    with pytest.raises(UserError, match=r"01.mp4 \(bits are missing\)"):
        store_of(folder, cache, strict=True)


def test_strict_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    folder = videos(tmp_path / "v")
    break_middle(monkeypatch)
    with pytest.raises(UserError, match="bits are missing"):
        store_of(folder, cache, strict=True)
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_nothing_readable_is_one_sentence_and_writes_nothing(tmp_path, cache):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_text("hello")
    with pytest.raises(UserError, match=r"has no readable episode: 1 unreadable: a.mp4"):
        store_of(tmp_path / "v", cache)
    assert not cache.exists()


def test_sizes_that_differ_need_a_resolution(tmp_path, cache):
    folder = videos(tmp_path / "v", 1)
    write_video(folder / "z.mp4", [0, 1], size=(32, 64))
    assert store_of(folder, cache).num_episodes == 2
    with pytest.raises(UserError, match="set `resolution`"):
        store_of(folder, cache, resolution=0)


def opening(path, cache, delay):
    args = [sys.executable, "-c", OPEN, str(path), str(cache), str(delay)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, text=True)


def entry_in(cache):
    return [p for p in cache.iterdir() if p.is_dir() and p.name != "memo"]


def test_a_killed_build_is_not_whole_and_is_continued(tmp_path, cache):
    folder = videos(tmp_path / "v", count=12, frames=8)
    process = opening(folder, cache, 0.05)
    journal, deadline = None, time.monotonic() + 300
    while time.monotonic() < deadline:
        found = list(cache.glob("*.partial/journal.jsonl"))
        if found and found[0].read_bytes().count(b"\n") >= 4:
            journal = found[0]
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert journal is not None
    assert [p.suffix for p in entry_in(cache)] == [".partial"]
    complete = journal.read_bytes().count(b"\n")
    assert 4 <= complete < 12
    with journal.open(
        "ab"
    ) as file:  # the kill may also cut a line, and leave frames of an unfinished episode
        file.write(b'{"times": [0.')
    with (journal.parent / "frames").open("ab") as file:
        file.write(b"half a frame")
    decoded = []
    chunks = pipeline.episode_chunks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pipeline, "episode_chunks", lambda plan, number: decoded.append(number) or chunks(plan, number)
        )
        store = store_of(folder, cache)
    assert sorted(decoded) == list(range(complete, 12))
    assert len(store.frames) == 96
    undisturbed = store_of(folder, tmp_path / "other")
    assert files(store.folder) == files(undisturbed.folder)
    assert [p.name for p in entry_in(cache)] == [store.digest]


def test_two_processes_build_at_once(tmp_path, cache):
    folder = videos(tmp_path / "v", count=6)
    both = [opening(folder, cache, 0.02) for _ in range(2)]
    keys = [process.communicate(timeout=300)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert keys[0] == keys[1]
    assert files(cache / keys[0]) == files(store_of(folder, tmp_path / "other").folder)


def test_frames_shorter_than_the_journal_start_over(tmp_path, cache):
    folder = videos(tmp_path / "v")
    whole = store_of(folder, cache)
    want = files(whole.folder)
    partial = whole.folder.rename(cache / f"{whole.digest}.partial")
    line = {"times": [0.0], "frame_indices": [0], "shape": [64, 64, 3]}
    (partial / "journal.jsonl").write_text(json.dumps(line) + "\n")
    os.truncate(partial / "frames", 100)
    assert files(store_of(folder, cache).folder) == want


def test_a_full_disk_is_one_sentence(tmp_path, cache, monkeypatch):
    folder = videos(tmp_path / "v")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=rf"{cache} must have {18 * 64 * 64 * 3} bytes of free space"):
        store_of(folder, cache)
    assert not entry_in(cache)


def test_a_disk_that_fills_up_while_writing_is_one_sentence(tmp_path, cache, monkeypatch):
    folder = videos(tmp_path / "v")
    monkeypatch.setattr(
        build, "_sync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="must have 221184 bytes of free space"):
        store_of(folder, cache)
    assert [p.suffix for p in entry_in(cache)] == [".partial"]
    monkeypatch.undo()
    assert len(store_of(folder, cache).frames) == 18


@pytest.mark.parametrize(
    ("name", "episodes", "frames"),
    [("g1_pick_bottle_lerobot_v21", 4, 406), ("real_robot_gifs", 1, 144), ("simpler_real_clips", 2, 83)],
)
def test_real_robot_video(tmp_path, cache, name, episodes, frames):
    if not (SHARED / name).is_dir():
        pytest.skip("the shared data is not beside this checkout")
    store = store_of(SHARED / name, cache, target_fps=10.0)
    assert store.num_episodes == episodes
    assert store.frames.shape == (frames, 64, 64, 3)
    assert np.all(np.diff(store.timestamps)[np.diff(store.episode) == 0] > 0)


def test_weights_have_the_permissions_of_other_files(tmp_path):
    """safetensors makes files that only their owner reads."""
    from safetensors.torch import save_file

    def mode(file):
        return file.stat().st_mode & 0o777

    (plain := tmp_path / "plain").touch()
    save_tensors(tmp_path / "own.safetensors", {"a": torch.zeros(2)})
    with atomic_dir(tmp_path / "vlm") as folder:
        (folder / "sub").mkdir()
        save_file({"a": torch.zeros(2)}, folder / "sub/other.safetensors")
    assert mode(tmp_path / "own.safetensors") == mode(plain)
    assert mode(tmp_path / "vlm/sub/other.safetensors") == mode(plain)
