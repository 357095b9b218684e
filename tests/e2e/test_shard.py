"""`latentact shard` and what reads shards, by the real command line."""

import json
import re
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from test_bad_input import sentence
from test_kill import contents, filled, kill, ok

from conftest import TINY_LAM, TINY_POLICY, cli, refused
from latentact.data.cache import DataConfig, open_store
from latentact.data.latents import read_labels
from latentact.errors import UserError
from latentact.io.video_writer import write_video

FLAGS = ("--codec", "png", "--shard-size-mb", "0.05", "--clip-frames", "5")
FAST = (*TINY_LAM, "training.steps=4", "data.resolution=32")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, blocks):
    out = tmp_path_factory.mktemp("shards") / "out"
    done = ok("shard", "--data", blocks, "--out", out, *FLAGS)
    assert "8 scenes, 24 clips, 96 frames" in done.stdout
    return out


def test_other_settings_in_the_same_folder_are_named(shards, blocks):
    command = ("shard", "--data", blocks, "--out", shards, *FLAGS)
    assert "shards of other frames: another dataset, camera, --resolution or --target-fps" in refused(
        *command, "--resolution", "32"
    )
    assert "holds shards with still_s = 0.0, not 2.0" in refused(*command, "--drop-still-s", "2")


def test_training_and_labels_equal_those_of_the_data(shards, blocks, tmp_path):
    found = {}
    for name, data in (("shards", shards), ("npz", blocks)):
        run, labels = tmp_path / name, tmp_path / f"{name}_labels"
        ok("train-lam", f"data.path={data}", f"out={run}", "frame_gap_s=0.1", *FAST)
        ok("label", "--lam", run, "--data", data, "--out", labels)
        found[name] = (run / "model.safetensors").read_bytes(), read_labels(labels)[0]
    assert found["shards"][0] == found["npz"][0]
    np.testing.assert_array_equal(found["shards"][1].vectors, found["npz"][1].vectors)
    np.testing.assert_array_equal(found["shards"][1].valid, found["npz"][1].valid)
    again = ok("label", "--lam", tmp_path / "shards", "--data", shards, "--out", tmp_path / "shards_labels")
    assert "already finished" in again.stderr
    done = ok("inspect", tmp_path / "shards", "--data", shards, "--out", tmp_path / "card", "--json")
    assert (tmp_path / "card/inspect.html").is_file()
    assert json.loads(done.stdout)["verdict"]
    ok("train-policy", "policy=bc", f"data.path={shards}", f"out={tmp_path}/bc", *TINY_POLICY)


def test_a_killed_run_resumes_with_the_same_bytes(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)
    for name in range(12):
        still = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        write_video(videos / f"{name:02d}.mp4", np.stack([np.roll(still, t, 1) for t in range(40)]), 10)
    command = ("shard", "--data", videos, "--shard-size-mb", "2", "--workers", "2", "--out")
    ok(*command, tmp_path / "whole")
    out, ready = tmp_path / "killed", filled(tmp_path / "killed", "shard-000000.json")
    code, said = kill([*command, out], ready, 0, tmp_path, within=0.3)
    assert code in (0, -9), said
    ok(*command, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / ".work").exists()
    assert "already finished" in ok(*command, out).stderr


@pytest.mark.slow
def test_lerobot_columns_and_tasks_travel(tmp_path):
    pytest.importorskip("lerobot")
    ok("collect", "babyai/GoToLocal", "--episodes", "3", "--out", tmp_path / "data", "--seed", "1")
    ok("shard", "--data", tmp_path / "data", "--out", tmp_path / "shards", *FLAGS)
    one, other = (
        open_store(DataConfig(path=str(tmp_path / name), resolution=0)) for name in ("data", "shards")
    )
    assert one.lengths.tolist() == other.lengths.tolist()
    assert (one.camera, one.action_space, one.action_names) == (
        other.camera,
        other.action_space,
        other.action_names,
    )
    assert [one.task_texts[t] for t in one.task] == [other.task_texts[t] for t in other.task]
    np.testing.assert_array_equal(one.frames[:], other.frames[:])
    np.testing.assert_array_equal(one.actions([0, 2]).filled(-1), other.actions([0, 2]).filled(-1))
    if one.state is not None:
        np.testing.assert_array_equal(one.state, other.state)


def test_settings_of_mixtures_and_patterns(shards, blocks, tmp_path, monkeypatch):
    pattern = f"{shards}/shard-{{000000..000001}}.tar"
    ok("train-lam", f"data.path={pattern}", f"out={tmp_path}/a", "data.shuffle_window=1", *FAST)
    mixture = f"data.mixture=[{{path: {shards}, weight: 2}}, {{path: {blocks}}}]"
    ok("train-lam", mixture, f"out={tmp_path}/b", *FAST)
    lam = json.loads((tmp_path / "b/lam.json").read_text())
    assert lam["model"] == "lapo"
    inspected = Mock(side_effect=UserError("Reached."))
    monkeypatch.setattr("latentact.stages.inspect_lam.inspect_lam", inspected)
    assert sentence(cli("inspect", tmp_path / "b")) == "error: Reached."
    (_, store), options = inspected.call_args
    assert str(store.path).endswith(f" + {blocks}")
    assert len(options["episodes"]) == 2  # of 16: those that were held out
    said = sentence(cli("inspect", tmp_path / "b", "--data", blocks, "--out", tmp_path / "part"))
    assert "Leave out --data" in said
    one = "data.mixture is a setting of train-lam and train-policy. Give this command one dataset"
    for command in (
        ("check-data", mixture),
        ("label", "--lam", tmp_path / "b", "--data", mixture, "--out", tmp_path / "c"),
        ("compare", "env=babyai/GoToLocal", mixture, f"out={tmp_path}/c"),
    ):
        assert one in sentence(cli(*command))


BAD = {
    "codec": (
        ("shard", "--data", "BLOCKS", "--out", "OUT", "--codec", "gif"),
        "--codec must be jpeg, png or mp4",
    ),
    "no data": (("shard", "--data", "NONE", "--out", "OUT"), "NONE does not exist"),
    "grids": (("shard", "--data", "GRIDS", "--out", "OUT"), "must hold images to be sharded, got grids"),
    "short": (
        ("shard", "--data", "BLOCKS", "--out", "OUT", "--min-frames", "50"),
        "must have a scene of at least 50",
    ),
    "weight": (("train-lam", "data.mixture=[{path: x, weight: 0}]", "out=OUT"), "weight of x .*more than 0"),
    "both": (("train-lam", "data.path=x", "data.mixture=[{path: x}]", "out=OUT"), "data.path must be empty"),
    "neither": (("train-lam", "out=OUT"), "data.path is required"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, blocks, tmp_path):
    np.savez(tmp_path / "grid.npz", obs=np.zeros((9, 5, 5, 2), np.uint8))
    places = {
        "OUT": tmp_path / "out",
        "BLOCKS": blocks,
        "GRIDS": tmp_path / "grid.npz",
        "NONE": tmp_path / "NONE",
    }
    words, message = BAD[name]
    for key, place in places.items():
        words = [word.replace(key, str(place)) for word in words]
    assert re.search(message, sentence(cli(*words)))
    assert not (tmp_path / "out").exists()


def test_damaged_shards_are_refused_or_skipped(shards, tmp_path, monkeypatch):
    copy = shutil.copytree(shards, tmp_path / "shards")
    tar = copy / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-700])
    said = sentence(cli("train-lam", f"data.path={copy}", f"out={tmp_path}/run", *FAST))
    assert "shard-000001.tar" in said
    assert not (tmp_path / "run").exists()
    done = cli("train-lam", f"data.path={copy}", f"out={tmp_path}/run", "data.no_strict=true", *FAST)
    assert done.returncode == 0, done.stderr
    assert "1 unreadable: shard-000001.tar" in done.stderr
    done = ok("shard", "--data", copy, "--out", tmp_path / "again", "--no-strict", "--json")
    assert json.loads(done.stdout)["dropped"]["unreadable_files"] == 1
    assert "shard-000001.tar" in sentence(cli("shard", "--data", copy, "--out", tmp_path / "refused"))
    checked = cli("check-data", copy)
    assert checked.returncode == 2
    assert "Not usable: shard-000001.tar is damaged" in checked.stdout
    assert "unreadable: shard-000001.tar" in ok("check-data", copy, "--no-strict").stdout
    commands = (
        ("label", "--lam", tmp_path / "run", "--data", copy, "--out", tmp_path / "labels"),
        ("precompute", "--lam-model-path", tmp_path / "run", "--dataset-root", copy),
    )
    for command in commands:
        more = ("--output", "file", "--output-dir", tmp_path / "file") if command[0] == "precompute" else ()
        assert "shard-000001.tar" in sentence(cli(*command, *more))
        ok(*command, *more, "--no-strict")
    inspect = ("inspect", tmp_path / "run", "--data", copy)
    assert "shard-000001.tar" in sentence(cli(*inspect))
    reached = UserError("Reached.")
    monkeypatch.setattr("latentact.stages.inspect_lam.inspect_lam", Mock(side_effect=reached))
    assert sentence(cli(*inspect, "--no-strict")) == "error: Reached."
