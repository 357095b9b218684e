"""Features of all commands: JSON results, LeRobot's names of flags, hub ids of datasets, generated help."""

from __future__ import annotations

import json
import re
from typing import Any

import huggingface_hub
import pytest

from conftest import TINY_LAM, TINY_POLICY, cli, write_blocks
from latentact.cli.flags import settings_as_flags, translate_flags, translate_settings
from latentact.cli.stage_command import FILE_COMMANDS
from latentact.data.cache import DataConfig, open_store
from latentact.errors import UserError
from latentact.stages.ground import GroundConfig
from latentact.stages.train_lam import TrainLamConfig


def result_of(*arguments: Any) -> dict[str, Any]:
    """The line of JSON that a command prints last, which is all that it prints."""
    done = cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert found["command"] == arguments[0]
    return found


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, blocks):
    """A LAM, labels and a policy, made with --json."""
    root = tmp_path_factory.mktemp("json")
    lam = result_of("train-lam", f"data.path={blocks}", *TINY_LAM, "training.steps=2", f"out={root}/lam")
    labels = result_of("label", "--lam", root / "lam", "--data", blocks, "--out", root / "labels")
    few = ("training.steps=2", f"labels={root}/labels")
    policy = result_of("train-policy", *TINY_POLICY, *few, f"out={root}/policy")
    assert [found["path"] for found in (lam, labels, policy)] == [
        str(root / name) for name in ("lam", "labels", "policy")
    ]
    return root


COMMANDS = {
    "cache": lambda a, b: ("--data", b, "--resolution", 16),
    "check-data": lambda a, b: (b,),
    "convert-lam": lambda a, b: (a / "lam", "--out", a / "converted"),
    "precompute": lambda a, b: (
        *("--lam-model-path", a / "lam", "--dataset-root", b, "--output-dir", a / "tokens"),
        *("--output", "file"),
    ),
    "ground": lambda a, b: (
        *(f"policy={a}/policy", f"labels={a}/labels", "labeled_episodes=2", "training.steps=2"),
        f"out={a}/ground",
    ),
    "inspect": lambda a, b: (a / "lam", "--data", b, "--out", a / "inspect", "--max-transitions", 16),
    "report": lambda a, b: (a / "lam",),
    "shard": lambda a, b: ("--data", b, "--out", a / "shards"),
}
"""Command -> what to type after it, with the artifacts and the data."""
KEYS = {
    "cache": {"folder", "entries"},
    "check-data": {"verdict"},
    "inspect": {"verdict", "cautions", "html"},
    "report": {"verdict", "html", "json"},
    "shard": {"path", "shards", "frames", "dropped"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_line(command, artifacts, blocks):
    found = result_of(command, *COMMANDS[command](artifacts, blocks))
    assert KEYS.get(command, {"path"}) <= found.keys()


STUBBED = {
    "collect": (("pusht", "--out", "data"), {"path": "data", "episodes": 1}),
    "record": (("pusht", "--out", "data"), {"path": "data", "episodes": 1}),
    "relabel": (("data", "--out", "corrected"), {"path": "corrected", "labels": 1}),
    "train-with-tokens": (("--dataset-root", "data", "--output-dir", "out"), {"path": "out"}),
    "rollout": (("--policy", "p", "--env", "pusht", "--out", "out"), {"success": 0.5}),
    "imitate": (("--mode=extract_only", "--latents-path=l", "--output-dir=out"), {"guide": {"fps": 10.0}}),
    "guide": (("info", "runs/latents"), {"guides": []}),
    "check-guidance": (("--policy-path=p", "--lam-model-path=l", "--output-dir=out"), {"verdict": "v"}),
    "train-vla": ((), {"path": "out", "numbers": {"score": 0.5}}),
    "finetune-vla": (("vla=v", "labels=l"), {"path": "out", "numbers": {}}),
    "push": (("runs/lam", "owner/name"), {"address": "https://hf.co/owner/name"}),
    "demo": (("--out", "out"), {"verdict": "v"}),
    "adapt-policy": (("--policy=p", "--data=d", "--out=o"), {"path": "o"}),
    "preview-augment": (("--data=d", "--shift=1", "--out=o"), {"path": "o"}),
    "studio": (("runs/lam",), {"path": "runs/lam/studio", "address": "http://127.0.0.1:7860"}),
    "plan": (("--labels=l", "--budget=1"), {"path": "plan.json", "episodes": []}),
    "export": (("--labels=l", "--out=o"), {"path": "o"}),
    "compare": (("data.path=data", "env=pusht", "out=out"), {"verdict": "v"}),
}
"""Commands that take long: what to type after each, and what its stage is made to return."""


@pytest.mark.parametrize("command", STUBBED)
def test_json_is_one_line_of_long_commands(command, monkeypatch, tmp_path):
    arguments, returned = STUBBED[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"latentact.stages.{command.replace('-', '_')}.run", lambda *_: returned)
    assert result_of(command, *arguments) == {"command": command, **returned}


def test_every_command_has_json():
    tested_elsewhere = {"doctor"}
    assert {*COMMANDS, *STUBBED, *tested_elsewhere, "train-lam", "label", "train-policy"} == {
        *FILE_COMMANDS,
        *("train-lam", "train-policy", "train-vla", "finetune-vla", "ground", "compare"),
    }


def test_data_that_is_not_usable(tmp_path):
    (tmp_path / "a.mp4").write_text("this is not a video")
    done = cli("check-data", tmp_path, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["command"] == "check-data"


@pytest.mark.parametrize(
    ("command", "typed", "translated"),
    [
        ("label", "--dataset.root=data --output_dir=out", "--data data --out out"),
        ("label", "--dataset.repo_id a/b --dataset.root data", "--data data"),
        ("inspect", "--lam=runs/lam --seed 1", "runs/lam --seed 1"),
        ("label", "--dataset.repo_id=a/b@v1 --batch_size=8", "--data a/b@v1 --batch-size=8"),
        ("check-data", "--dataset.root=data --json", "data --json"),
        ("precompute", "--dataset.repo_id=a/b --dataset.root=d", "--dataset-repo-id a/b --dataset-root d"),
        ("rollout", "--policy.path=p --env pusht --output-dir o", "--policy p --env pusht --out o"),
        ("imitate", "--policy.path p --output_dir o", "--policy-path p --output-dir o"),
        ("imitate", "--latents-path g --latents_path=g", "--guide g --guide g"),
        ("record", "babyai/GoToLocal --stroke 0.1", "babyai/GoToLocal --step-size 0.1"),
        ("check-guidance", "--policy.path p --output_dir=o", "--policy-path p --output-dir o"),
        ("train-with-tokens", "--policy.path=p", "--policy.path=p"),
    ],
)
def test_names_of_lerobot(command, typed, translated):
    stage = FILE_COMMANDS[command]
    assert translate_flags(typed.split(), stage.flags, stage.argument) == translated.split()


def test_names_of_lerobot_for_settings():
    typed = ["--dataset.repo_id=a/b", "--dataset.root=data", "--output_dir", "out", "training.steps=2"]
    assert translate_settings(typed, TrainLamConfig) == ["data.path=data", "out=out", "training.steps=2"]
    assert translate_settings(["--policy.path=p"], GroundConfig) == ["policy=p"]
    assert translate_settings(["--policy.path=p"], TrainLamConfig) == ["--policy.path=p"]


def test_names_of_lerobot_reach_the_stage(artifacts, blocks, tmp_path):
    found = result_of(
        "label", f"--lam={artifacts}/lam", f"--dataset.root={blocks}", f"--output_dir={tmp_path}/labels"
    )
    assert found["path"] == str(tmp_path / "labels")


def test_a_dataset_of_the_hub(artifacts, blocks, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, *, repo_type, revision, **_):
        asked.append((repo_id, repo_type, revision))
        return str(blocks)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    result_of("label", "--lam", artifacts / "lam", "--data", "somebody/toys@v1", "--out", "labels")
    assert {*asked} == {("somebody/toys", "dataset", "v1")}
    manifest = json.loads((tmp_path / "labels/manifest.json").read_text())
    assert manifest["data"]["path"] == "somebody/toys@v1"
    asked.clear()
    store = open_store(DataConfig(path="somebody/toys", resolution=32))
    assert store.num_episodes == 8
    assert {*asked} == {("somebody/toys", "dataset", "v3.0")}
    result_of("check-data", "somebody/toys")
    result_of("inspect", artifacts / "lam", "--data", "somebody/toys", "--out", "inspect")
    result_of("cache", "--data", "somebody/toys")


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    def download(*_, **__):
        raise AssertionError("the hub must not be asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody").mkdir()
    with pytest.raises(UserError, match="somebody/toys does not exist"):
        open_store(DataConfig(path="somebody/toys"))
    write_blocks(tmp_path / "somebody/toys.npz", episodes=2)
    assert open_store(DataConfig(path="somebody/toys.npz", resolution=32)).num_episodes == 2


def test_a_dataset_that_cannot_be_downloaded(monkeypatch):
    def download(*_, **__):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"somebody/toys must be a folder or .* got neither \(no network\)"):
        open_store(DataConfig(path="somebody/toys"))


def test_help_comes_from_the_stage():
    shown = " ".join(cli("collect", "--help").stdout.replace("│", " ").split())
    assert "Episodes to collect." in shown
    assert "[default: 100]" in shown
    assert "agent|full" in shown
    assert "suites: babyai, gymnasium, metaworld, procgen, pusht, xland." in shown


def test_switches_that_are_on_can_be_typed_both_ways():
    flags = FILE_COMMANDS["imitate"].flags
    shown = cli("imitate", "--help").stdout
    assert "--no-render" in shown
    assert "Turn off" not in shown
    typed = settings_as_flags(["render=false", "save_video=true"], flags, "imitate")
    assert typed == ["--no-render", "--save-video"]
    assert translate_flags(["--render=false", "--save_video=true"], flags, "") == typed
    assert translate_flags(["--render=true", "--save-video=False"], flags, "")[1:] == ["--no-save-video"]


def test_help_has_the_defaults_of_nested_settings():
    lines = cli("finetune-vla", "--help").stdout.splitlines()
    shown = dict(line.split("=", 1) for line in map(str.strip, lines) if re.match(r"[a-z_.]+=\S+  \(", line))
    assert shown["training.steps"] == "2000  (int)"
    assert shown["training.lr"] == "2e-05  (float)"
    assert shown["head.kind"] == "chunk  (str)"
    assert shown["vla"] == "required  (str)"
    assert "cluster.kind" not in shown
