"""Shards: writing, resuming, reading by byte range, damage, foreign tars, mixtures, order of samples."""

import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distributed_training
from conftest import fork, ranks, write_blocks
from latentact.data.access import IndexedFrames
from latentact.data.cache import DataConfig, open_store
from latentact.data.check import check_data
from latentact.data.mixture import MixedStore, MixturePart, TrainingDataConfig, open_training_store
from latentact.data.order import Order
from latentact.data.splits import split_episodes
from latentact.data.store import Sampling
from latentact.data.stream import FrameStream
from latentact.data.tars import ShardIndex, sealed, tar_files, write_record
from latentact.data.windows import Clips
from latentact.errors import UserError
from latentact.io.video_writer import write_video
from latentact.stages.shard import ShardConfig, run
from latentact.training.fit import fit
from latentact.types import ActionSpace

SMALL = {"codec": "png", "shard_size_mb": 0.03, "clip_frames": 5, "workers": 1}


def make(data, out, **settings):
    return run(ShardConfig(data=DataConfig(path=str(data)), out=str(out), **{**SMALL, **settings}))


def opened(path, **settings):
    return open_store(DataConfig(path=str(path), **{"resolution": 0, **settings}))


def hashes(folder):
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir()) if f.is_file()
    }


def noise(seed, n=20, size=64):
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 256, (size, size, 3))
    moving = [np.roll(still, t, 1) // 2 + 40 for t in range(n)]
    return np.stack(moving).astype(np.uint8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, blocks):
    """The blocks as PNG: 8 episodes of 12 frames, in several shards."""
    out = tmp_path_factory.mktemp("shards") / "out"
    make(blocks, out)
    return out


def copy_of(shards, tmp_path):
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_store_of_shards_equals_that_of_the_data(shards, blocks):
    one, other = opened(shards), opened(blocks)
    assert isinstance(one.frames, IndexedFrames)
    assert len(one.groups) == len(list(shards.glob("*.tar"))) > 2
    assert one.groups[0][0] == 0
    assert one.groups[-1][1] == one.num_episodes == 8
    assert all(a[1] == b[0] for a, b in itertools.pairwise(one.groups))
    np.testing.assert_array_equal(one.frames[:], other.frames)
    np.testing.assert_array_equal(one.frames[[5, 5, 90]], other.frames[[5, 5, 90]])
    np.testing.assert_array_equal(one.frames[7], other.frames[7])
    np.testing.assert_array_equal(
        one.frames[np.array([[1, 2], [3, 1]])], other.frames[np.array([[1, 2], [3, 1]])]
    )
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_allclose(one.timestamps, other.timestamps)
    assert one.action_space == other.action_space
    episodes = [0, 3]
    np.testing.assert_array_equal(one.actions(episodes).filled(-1), other.actions(episodes).filled(-1))
    clips = [Clips(s, episodes=[1, 2], frame_gap=2, context=1).__getitems__([0, 9, 3]) for s in (one, other)]
    assert torch.equal(clips[0].frames, clips[1].frames)
    assert torch.equal(clips[0].action, clips[1].action)


def test_the_cache_and_the_stream_show_the_same_frames(shards):
    config = DataConfig(path=str(shards), resolution=16, target_fps=5.0)
    stored = open_store(config)
    stream = FrameStream(config)
    assert stream.groups == stored.groups
    parts = [c.frames for _, chunks in stream.episodes(range(8), workers=1) for c in chunks]
    np.testing.assert_array_equal(np.concatenate(parts), stored.frames[:])
    cached = open_store(config, cached=True)
    assert isinstance(cached.frames, np.memmap)
    assert (cached.digest, cached.fps) == (stored.digest, 5)
    np.testing.assert_array_equal(cached.frames, stored.frames[:])
    np.testing.assert_array_equal(cached.frame_times, stored.frame_times)
    assert isinstance(open_store(config).frames, np.memmap)  # once it is there, it is used


def test_workers_change_no_byte(shards, blocks, tmp_path):
    make(blocks, tmp_path / "out", workers=3)
    assert hashes(tmp_path / "out") == hashes(shards)


@pytest.mark.parametrize("finished", [1, 2])
def test_an_interrupted_run_writes_what_is_missing(shards, blocks, tmp_path, monkeypatch, finished):
    left = iter(range(finished))
    real = __import__("latentact.stages.shard", fromlist=["x"]).write_record

    def dies(file, record):
        if file.name.startswith("shard-") and next(left, None) is None:
            raise KeyboardInterrupt
        real(file, record)

    out = tmp_path / "out"
    monkeypatch.setattr("latentact.stages.shard.write_record", dies)
    with pytest.raises(KeyboardInterrupt):
        make(blocks, out)
    monkeypatch.undo()
    assert len(list(out.glob("shard-*.json"))) == finished
    kept = {f: f.stat().st_mtime_ns for f in out.glob("shard-*.json")}
    make(blocks, out)
    assert hashes(out) == hashes(shards)
    assert all(f.stat().st_mtime_ns == time for f, time in kept.items())
    assert not (out / ".work").exists()


def test_other_settings_and_other_files_are_refused(shards, blocks, tmp_path):
    with pytest.raises(UserError, match=r"clip_frames = 5, not 6"):
        make(blocks, shards, clip_frames=6)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files, such as notes.txt"):
        make(blocks, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_verify_writes_an_altered_shard_again(shards, blocks, tmp_path):
    copy = copy_of(shards, tmp_path)
    data = bytearray((copy / "shard-000001.tar").read_bytes())
    data[5000] ^= 255
    (copy / "shard-000001.tar").write_bytes(data)
    make(blocks, copy)
    assert hashes(copy) != hashes(shards)
    kept = (copy / "shard-000002.tar").stat().st_mtime_ns
    make(blocks, copy, verify=True)
    assert hashes(copy) == hashes(shards)
    assert (copy / "shard-000002.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("truncate", "must have .* bytes, got"), ("alter", "was altered"), ("remove", "is missing")],
)
def test_a_damaged_shard_is_named_and_refused_or_skipped(shards, tmp_path, damage, reason):
    copy = copy_of(shards, tmp_path)
    tar = copy / "shard-000001.tar"
    data = tar.read_bytes()
    if damage == "remove":
        tar.unlink()
    else:
        tar.write_bytes(data[:-2000] if damage == "truncate" else data[:3000] + b"x" + data[3001:])
    with pytest.raises(UserError, match=rf"1 unreadable: shard-000001.tar \(.*{reason}.*--no-strict"):
        opened(copy)
    store = opened(copy, no_strict=True)
    assert list(store.unreadable) == ["shard-000001.tar"]
    assert 0 < store.num_episodes < 8
    assert store.frames[:].shape[0] == store.num_frames
    check, _ = check_data(copy)
    assert not check.usable
    assert "shard-000001.tar" in check.errors[0]


def test_a_damaged_image_is_named_when_it_is_read(shards, tmp_path):
    copy = copy_of(shards, tmp_path)
    tar = copy / "shard-000000.tar"
    about = json.loads(tar.with_suffix(".json").read_text())
    begin = about["clips"][0]["offsets"][2]
    data = bytearray(tar.read_bytes())
    data[begin : begin + 60] = bytes(60)
    tar.write_bytes(data)
    about["sha256"] = hashlib.sha256(data).hexdigest()  # as if it had been written so
    write_record(tar.with_suffix(".json"), sealed(ShardIndex.model_validate(about)))
    store = opened(copy)
    assert store.frames[:2].shape[0] == 2
    with pytest.raises(UserError, match=r"blocks.npz #0 #0 in shard-000000.tar .*frame 2 cannot be decoded"):
        store.frames[2]


ALTERED = {
    "ranges": lambda about: about["clips"][0]["offsets"].reverse(),
    "hash": lambda about: about.update(sha256="0" * 64),
    "rate": lambda about: [clip.update(fps=7.0) for clip in about["clips"]],
    "actions": lambda about: about["action_space"].update(size=9),
    "a number that is text": lambda about: about["clips"][0].update(count="5"),
    "cut short": None,
}


@pytest.mark.parametrize("what", ALTERED)
def test_an_altered_json_file_beside_an_intact_tar_is_named(shards, blocks, tmp_path, what):
    copy = copy_of(shards, tmp_path)
    beside = copy / "shard-000001.json"
    text = beside.read_text()
    if change := ALTERED[what]:
        about = json.loads(text)
        change(about)
        beside.write_text(json.dumps(about))
    else:
        beside.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"1 unreadable: shard-000001.tar \(.*shard-000001.json"):
        opened(copy)
    assert list(opened(copy, no_strict=True).unreadable) == ["shard-000001.tar"]
    make(blocks, copy)
    assert hashes(copy) == hashes(shards)


def test_a_json_file_of_an_older_release_has_no_hash(shards, tmp_path):
    copy = copy_of(shards, tmp_path)
    about = json.loads((copy / "shard-000001.json").read_text())
    del about["digest"]
    (copy / "shard-000001.json").write_text(json.dumps(about))
    store = opened(copy)
    np.testing.assert_array_equal(store.frames[:], opened(shards).frames[:])
    assert len(store._source.notes) == 1
    assert store._source.notes[0].startswith("1 JSON files of an older release have no hash of their own")


def test_hashing_shows_its_progress(shards, tmp_path, monkeypatch, caplog):
    copy = copy_of(shards, tmp_path)
    for file in copy.glob("*.tar"):  # what follows the end of a tar is not read
        file.with_suffix(".json").unlink()
        file.write_bytes(file.read_bytes() + bytes(1 << 20))
    with caplog.at_level("INFO"):
        opened(copy)
        count = len(list(copy.glob("*.tar")))
        assert f"checking shards: {count} MB" in caplog.text
        caplog.clear()
        opened(copy)
        assert "checking shards" not in caplog.text


def test_cuts_still_spans_and_duplicates(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    moving, other = noise(0, 24), noise(1, 16)
    still = np.repeat(moving[-1:], 20, 0)
    write_video(videos / "a.mp4", np.concatenate([moving, still, other]), 10)
    (videos / "b.mp4").write_bytes((videos / "a.mp4").read_bytes())
    write_video(videos / "c.mp4", noise(2, 3), 10)
    (videos / "d.mp4").write_text("no video")
    settings = {"codec": "jpeg", "drop_still_s": 1.0, "drop_duplicates": True, "min_frames": 4}
    result = make(videos, tmp_path / "out", clip_frames=64, **settings)
    m = result.manifest
    assert m["cuts"] == 2  # one in each copy
    assert m["dropped"] == {
        "unreadable_files": 1,
        "skipped_files": 0,
        "still_frames": 40,
        "short_scene_frames": 3,
        "duplicate_episodes": 1,
        "duplicate_frames": 40,
    }
    assert m["frames"] == 40
    store = opened(tmp_path / "out")
    assert store.lengths.tolist() == [24, 16]
    assert store.episode_ids == ("a.mp4 #0", "a.mp4 #1")
    shown = other[6].repeat(4, 0).repeat(4, 1).astype(int)
    assert np.abs(store.frames[30] - shown).mean() < 15
    whole = make(videos, tmp_path / "whole", cuts="never", clip_frames=64, min_frames=1)
    assert (whole.manifest["cuts"], whole.manifest["scenes"], whole.manifest["frames"]) == (0, 3, 123)
    with pytest.raises(UserError, match=r"1 unreadable: d.mp4"):
        run(ShardConfig(data=DataConfig(path=str(videos), strict=True), out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_a_scene_larger_than_a_shard_is_split_and_others_are_not(blocks, tmp_path):
    make(blocks, tmp_path / "one", shard_size_mb=0.012)  # an episode of 12 frames has about 16 kB
    store = opened(tmp_path / "one")
    assert store.num_episodes > 8
    np.testing.assert_array_equal(store.frames[:], opened(blocks).frames)
    assert sum(length == 12 for length in store.lengths) < 8


def test_mp4_shards_hold_the_same_within_the_codec(blocks, tmp_path):
    make(blocks, tmp_path / "out", codec="mp4", clip_frames=7)
    store, exact = opened(tmp_path / "out"), opened(blocks)
    assert isinstance(store.frames, np.memmap)
    for file in (tmp_path / "out").glob("*.json"):
        file.unlink()
    foreign = opened(tmp_path / "out")
    np.testing.assert_array_equal(foreign.frames, store.frames)
    np.testing.assert_allclose(foreign.frame_times, store.frame_times, atol=1e-3)
    assert store.lengths.tolist() == exact.lengths.tolist()
    assert np.abs(store.frames.astype(int) - exact.frames).mean() < 4
    np.testing.assert_array_equal(store.actions([2]).filled(-1), exact.actions([2]).filled(-1))


def test_shards_of_shards(shards, tmp_path):
    make(shards, tmp_path / "again", shard_size_mb=1.0)
    assert len(list((tmp_path / "again").glob("*.tar"))) == 1
    one, other = opened(shards), opened(tmp_path / "again")
    np.testing.assert_array_equal(one.frames[:], other.frames[:])
    np.testing.assert_array_equal(one.actions([0]).filled(-1), other.actions([0]).filled(-1))


def test_webdataset_streams_our_shards(shards):
    webdataset = pytest.importorskip("webdataset")
    files = sorted(map(str, shards.glob("*.tar")))
    samples = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
    assert len(samples) == 8 * 3  # clips of 5, 5 and 2 frames
    first = samples[0]
    assert first["__key__"] == "ep000000_s0000_c00000"
    assert sorted(k for k in first if not k.startswith("__")) == sorted(
        ["json", "action.npy", *(f"{n:04d}.png" for n in range(5))]
    )
    assert json.loads(first["json"])["frames"] == 5
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(first["0003.png"]))), opened(shards).frames[3]
    )


def test_our_shards_without_their_json_files(shards, tmp_path):
    for file in shards.glob("*.tar"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    one, other = opened(shards), opened(tmp_path)
    assert one.lengths.tolist() == other.lengths.tolist()
    assert one.action_space == other.action_space
    assert one.fps == other.fps
    np.testing.assert_array_equal(one.frames[:], other.frames[:])


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def image(frame, kind):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind)
    return buffer.getvalue()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_foreign_tars_of_every_kind(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    evil = pickle.dumps(Evil(str(tmp_path / "mark")))
    a, b = noise(0, 5, 33), noise(1, 4, 40)
    with tarfile.open(data / "clips.tar", "w") as tar:  # frames of a sample, odd sizes, a pickle
        for n, frame in enumerate(a):
            add(tar, f"x/robot_1.frame_{n + 8}.JPG", image(frame, "JPEG"))
        add(tar, "x/robot_1.txt", b"pick the cup")
        add(tar, "x/robot_1.extra.pkl", evil)
    with tarfile.open(data / "frames.tar", "w") as tar:  # a frame per sample; the second video begins again
        for video in (0, 1):
            for n, frame in enumerate(b):
                add(tar, f"{n:05d}.png", image(frame, "PNG"))
                add(tar, f"{n:05d}.json", json.dumps({"fps": 10, "instruction": f"task {video}"}).encode())
    write_video(tmp_path / "v.mp4", noise(3, 6, 224), 10)
    with tarfile.open(data / "videos.tar", "w") as tar:
        add(tar, "__meta__.json", b"{}")
        add(tar, "0001.mp4", (tmp_path / "v.mp4").read_bytes())
        add(tar, "0002.mp4", b"no video")
        add(tar, "0001.readme", b"")
    store = opened(data, resolution=32)
    assert store.lengths.tolist() == [5, 4, 4, 6]
    assert store.task_texts == ("", "pick the cup", "task 0", "task 1")
    assert store.fps == 10  # the first tar names none
    assert store.frames[:].shape == (19, 32, 32, 3)
    assert list(store.unreadable) == ["videos.tar/0002"]
    source = store._source
    assert source.skipped == {"clips.tar *.pkl": "1 members", "videos.tar *.readme": "1 members"}
    shown = [frame for _, frame in source.frames(1)]
    np.testing.assert_array_equal(shown[2], b[2])
    assert [frame.shape for _, frame in source.frames(0)] == [(33, 33, 3)] * 5
    assert not (tmp_path / "mark").exists()
    with pytest.raises(UserError, match="does not exist"):
        opened("pipe:touch mark")


def test_a_rate_for_data_that_states_none(tmp_path, blocks, caplog):
    data = tmp_path / "data"
    data.mkdir()
    for number, rate in enumerate([{}, {"fps": 5}]):
        with tarfile.open(data / f"{number}.tar", "w") as tar:
            for n, frame in enumerate(noise(number, 4)):
                add(tar, f"e_{n}.png", image(frame, "PNG"))
                add(tar, f"e_{n}.json", json.dumps(rate).encode())
    untimed = data / "0.tar"
    assert opened(untimed).fps == 1
    assert "no frame rate is stated: 1 frames per second are assumed, unless data.fps is set" in caplog.text
    caplog.clear()
    store = opened(untimed, fps=10.0)
    assert store.fps == 10
    np.testing.assert_allclose(store.timestamps, np.arange(4) / 10)
    assert "no frame rate" not in caplog.text
    assert opened(data).fps == 5  # that of the tar which states one
    both = opened(data, fps=10.0)
    assert (both.fps, both.lengths.tolist()) == (5, [2, 4])  # 10 is resampled to 5
    with pytest.raises(UserError, match=r"data.fps must be 0 for .*1.tar, which states 5 frames per second"):
        opened(data / "1.tar", fps=10.0)
    assert opened(data / "1.tar", fps=5.0).fps == 5
    with pytest.raises(UserError, match="fps must be 0 or between"):
        opened(untimed, fps=-1.0)
    arrays = tmp_path / "arrays.npz"
    np.savez(arrays, obs=noise(2, 6))
    assert opened(arrays, fps=10.0).fps == 10
    parts = (MixturePart(path=str(untimed), fps=10.0), MixturePart(path=str(arrays), fps=10.0))
    mixed = open_training_store(TrainingDataConfig(mixture=parts, resolution=32))
    np.testing.assert_allclose(mixed.frame_times, [*(np.arange(4) / 10), *(np.arange(6) / 10)])


def test_cameras_of_a_foreign_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n, frame in enumerate(noise(0, 3)):
            add(tar, f"e_{n}.front.png", image(frame, "PNG"))
            add(tar, f"e_{n}.wrist.png", image(255 - frame, "PNG"))
            buffer = io.BytesIO()
            np.save(buffer, np.array([n, -n], np.float32))
            add(tar, f"e_{n}.action.npy", buffer.getvalue())
    with pytest.raises(UserError, match=r"2 cameras \(front, wrist\)"):
        opened(tmp_path)
    store = opened(tmp_path, camera="wrist")
    np.testing.assert_array_equal(store.frames[:], 255 - noise(0, 3))
    assert store.action_space == ActionSpace(kind="continuous", size=2)
    assert store.actions([0]).tolist() == [[0, 0], [1, -1], [2, -2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("gzip", "a.tar .*compressed; unpack it"),
        ("cut", "a.tar .*truncated|a.tar .*not a complete tar"),
        ("text", "a.tar .*not a complete tar"),
        ("no images", "has no readable episode"),
    ],
)
def test_unusable_tars_are_one_sentence(tmp_path, content, message):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w:gz" if content == "gzip" else "w") as tar:
        for n, frame in enumerate(noise(0, 3)):
            add(tar, f"e_{n}.{'cls' if content == 'no images' else 'png'}", image(frame, "PNG"))
    if content == "cut":
        file.write_bytes(file.read_bytes()[: -(1 << 13)])
    if content == "text":
        file.write_text("no tar " * 400)
    with pytest.raises(UserError, match=message):
        opened(file)


def test_patterns(shards, tmp_path):
    count = len(list(shards.glob("*.tar")))
    pattern = f"{shards}/shard-{{000000..{count - 1:06d}}}.tar"
    assert tar_files(type(shards)(pattern)) == sorted(shards.glob("*.tar"))
    assert opened(pattern).num_episodes == 8
    assert opened(f"{shards}/shard-*.tar").num_episodes == 8
    assert 0 < opened(f"{shards}/shard-{{000000,000001}}.tar").num_episodes < 8
    with pytest.raises(UserError, match=r"shard-000099.tar \(it does not exist\)"):
        opened(f"{shards}/shard-{{000000,000099}}.tar")
    with pytest.raises(UserError, match="must match existing tar files"):
        opened(f"{tmp_path}/none-*.tar")


def test_the_store_travels_to_data_workers(shards):
    clips = Clips(opened(shards), episodes=range(8), frame_gap=1)
    loader = torch.utils.data.DataLoader(
        clips, batch_sampler=[[0, 5], [7, 30]], collate_fn=lambda clip: clip, num_workers=1
    )
    for batch, positions in zip(loader, ([0, 5], [7, 30]), strict=True):
        assert torch.equal(batch.frames, clips.__getitems__(positions).frames)


def mixed(tmp_path, blocks, shards, window=0):
    other = write_blocks(tmp_path / "other.npz", episodes=4, steps=30, seed=5)
    parts = (MixturePart(path=str(shards), weight=3.0), MixturePart(path=str(other)))
    return open_training_store(TrainingDataConfig(mixture=parts, resolution=0, shuffle_window=window)), other


def test_a_mixture_joins_stores_and_weights_their_samples(tmp_path, blocks, shards):
    store, other = mixed(tmp_path, blocks, shards)
    parts = [opened(shards), opened(other)]
    assert isinstance(store, MixedStore)
    assert store.num_episodes == 12
    np.testing.assert_array_equal(store.frames[:], np.concatenate([p.frames[:] for p in parts]))
    np.testing.assert_array_equal(store.frames[[100, 3]], np.stack([parts[1].frames[4], parts[0].frames[3]]))
    assert store.action_space == parts[0].action_space
    seen = store.actions([7, 9])
    assert np.ma.count(seen) == 12 + 30
    np.testing.assert_array_equal(seen[96 + 30 : 96 + 60], parts[1].actions([1])[30:60])
    clips = Clips(store, episodes=split_episodes(store, held_out=0.2, seed=0)[0], frame_gap=1)
    drawn = np.concatenate([clips.rows[clips.order(0, step, 100)] for step in range(100)])
    assert np.mean(drawn < 96) == pytest.approx(0.75, abs=0.02)
    assert {*drawn} == {*clips.rows}


def test_a_mixture_of_different_rates_is_refused(tmp_path, blocks):
    other = tmp_path / "slow.npz"
    np.savez(other, **{**np.load(blocks), "fps": 5})
    parts = (MixturePart(path=str(blocks)), MixturePart(path=str(other)))
    with pytest.raises(UserError, match=r"one frame rate, got 10 .* and 5 .*Set data.target_fps=5"):
        open_training_store(TrainingDataConfig(mixture=parts, resolution=0))
    assert open_training_store(TrainingDataConfig(mixture=parts, resolution=0, target_fps=5.0)).fps == 5
    with pytest.raises(UserError, match=r"data.path must be empty with data.mixture"):
        TrainingDataConfig(path="x", mixture=parts).require()


def test_the_order_without_a_window_is_uniform(blocks):
    store = opened(blocks)
    order = Order(store, np.arange(50))
    np.testing.assert_array_equal(order(3, 7, 16), np.random.default_rng((3, 7)).integers(50, size=16))


def test_a_window_draws_from_few_shards_at_a_time(tmp_path, shards):
    store = opened(shards)
    store.sampling = Sampling(parts=((0, 8, 1.0),), window=2)
    clips = Clips(store, episodes=range(8), frame_gap=1)
    shard = np.repeat(np.arange(len(store.groups)), [end - begin for begin, end in store.groups])
    used, steps = [], 2 * len(clips) // 8
    for step in range(steps):
        rows = clips.rows[clips.order(0, step, 8)]
        used.append(frozenset(shard[store.episode[rows]].tolist()))
        np.testing.assert_array_equal(
            rows, clips.rows[Clips(store, episodes=range(8), frame_gap=1).order(0, step, 8)]
        )
    assert max(map(len, used)) <= 2
    assert frozenset().union(*used) == {*range(len(store.groups))}
    changes = sum(not a & b for a, b in itertools.pairwise(used))
    assert changes <= 2 * len(store.groups)  # the window moves on, it does not jump about


class Drawn(Clips):
    """Windows of a mixture that writes down which of them a process is asked for."""

    def __getitems__(self, positions):
        with open(f"{self.out}/drawn{os.environ.get('RANK', 0)}.txt", "a") as file:
            file.write(f"{json.dumps(positions)}\n")
        return distributed_training.Batch(torch.tensor(positions))


def draw(out, devices, cache, *paths):
    """Train on a mixture whose shards are drawn one at a time."""
    parts = (MixturePart(path=paths[0], weight=3.0), MixturePart(path=paths[1]))
    config = TrainingDataConfig(mixture=parts, resolution=0, shuffle_window=1, cache_dir=cache)
    clips = Drawn(open_training_store(config), episodes=range(12), frame_gap=1)
    clips.out, model = out, distributed_training.Toy()
    settings = distributed_training.settings("ddp" if devices > 1 else "auto", devices, 6, 1)

    def evaluate(last):
        if not last and not Path(f"{out}/kept").exists():
            shutil.copytree(f"{out}/checkpoints/step=00000003", f"{out}/kept/step=00000003")
        return {}

    Path(out).mkdir(exist_ok=True)
    fit(model, clips, replace(settings, eval_every=4), Path(out), evaluate)
    torch.save(model.state_dict(), f"{out}/weights.pt")


def drawn(out, first):
    """Return the samples of each step, in the order of one process."""
    files = sorted(out.glob("drawn*.txt"))
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [np.stack(each, 1).reshape(-1).tolist() for each in zip(*lines, strict=True)][: 6 - first]


@pytest.mark.slow
def test_two_processes_draw_what_one_draws_and_resume_exactly(tmp_path, blocks, shards):
    other = write_blocks(tmp_path / "other.npz", episodes=4, steps=30, seed=5)
    given = (os.environ["LATENTACT_CACHE"], str(shards), str(other))

    def both(name):
        logs = [tmp_path / f"{name}{number}" for number in range(2)]
        started = [
            fork(draw, str(tmp_path / name), 2, *given, log=log, **environment)
            for log, environment in zip(logs, ranks(2), strict=True)
        ]
        for process, log in zip(started, logs, strict=True):
            process.join()
            assert process.exitcode == 0, log.read_text()
        return torch.load(tmp_path / name / "weights.pt", weights_only=True)

    draw(str(tmp_path / "one"), 1, *given)
    weights = both("two")
    one, two = drawn(tmp_path / "one", 0), drawn(tmp_path / "two", 0)
    assert len(one) == 6
    assert two == one
    shutil.copytree(tmp_path / "two/kept", tmp_path / "again/checkpoints")
    again = both("again")
    assert drawn(tmp_path / "again", 3) == one[3:]
    assert all(torch.equal(again[name], weights[name]) for name in weights)
