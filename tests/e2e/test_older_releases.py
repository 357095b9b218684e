"""Settings, run folders and checkpoints by the names of an older release still work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conftest import TINY_LAM, TINY_POLICY, cli
from latentact.config import current_names
from latentact.policies.contract import Policy
from latentact.stages.train_policy import TrainPolicyConfig

BC = (
    "policy=bc",
    "labelled_episodes=4",
    "policy.network.chunk=2",
    "policy.network.execute=1",
    "held_out=0.25",
)


def older(path: Path) -> None:
    """Write the settings in a file by the names of the older release."""
    text = path.read_text()
    for new, old in (
        ("labeled_episodes", "labelled_episodes"),
        ("n_obs_steps", "frames"),
        ("chunk_size", "chunk"),
        ("n_action_steps", "execute"),
    ):
        text = text.replace(new, old)
    path.write_text(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, blocks: Path) -> tuple[Path, tuple[str, ...]]:
    """A behavior cloning run whose settings were typed by their older names, and its command line."""
    out = tmp_path_factory.mktemp("older") / "bc"
    command = ("train-policy", f"data.path={blocks}", "data.resolution=32", *TINY_POLICY, *BC, f"out={out}")
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert "labelled_episodes is deprecated; use labeled_episodes" in done.stderr
    assert "policy.network.chunk is deprecated; use policy.network.chunk_size" in done.stderr
    return out, command


def test_older_names_set_the_settings_of_today(run: tuple[Path, tuple[str, ...]]) -> None:
    config = yaml.safe_load((run[0] / "config.yaml").read_text())
    assert config["labeled_episodes"] == 4
    assert config["policy"]["network"]["chunk_size"] == 2


def test_a_run_folder_of_the_older_release_is_finished(run: tuple[Path, tuple[str, ...]]) -> None:
    out, command = run
    older(out / "config.yaml")
    changed = (out / "model.safetensors").stat().st_mtime_ns
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert "already finished" in done.stderr
    assert (out / "model.safetensors").stat().st_mtime_ns == changed


def test_a_checkpoint_of_the_older_release_loads(run: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    whole = Policy.from_pretrained(run[0])
    whole.save_pretrained(tmp_path / "policy")
    older(tmp_path / "policy" / "config.json")
    assert "frames" in json.loads((tmp_path / "policy" / "config.json").read_text())["policy"]["network"]
    assert Policy.from_pretrained(tmp_path / "policy").config == whole.config


ONE_FOR_ALL = {"codebooks": 2, "codebook_size": 64, "commitment": 0.05, "beta": 0.25, "decay": 0.999}
ONE_FOR_ALL |= {"entropy": 0.1, "levels": [8, 5, 5, 5], "weight": 0.001, "guard": False}


def test_a_model_and_labels_with_one_config_for_all_bottlenecks_are_finished(
    blocks: Path, tmp_path: Path
) -> None:
    lam, labels = tmp_path / "lam", tmp_path / "labels"
    commands = (
        ("train-lam", f"data.path={blocks}", *TINY_LAM, f"out={lam}"),
        ("label", "--lam", lam, "--data", blocks, "--out", labels),
    )
    for command in commands:
        assert cli(*command).returncode == 0
    saved = (lam / "model.safetensors").stat().st_mtime_ns
    settings = yaml.safe_load((lam / "config.yaml").read_text())
    settings["lam"]["bottleneck"] |= ONE_FOR_ALL
    (lam / "config.yaml").write_text(yaml.safe_dump(settings))
    for path, keys in ((lam / "config.json", ("lam",)), (labels / "manifest.json", ("asked", "model"))):
        values = found = json.loads(path.read_text())
        for key in keys:
            found = found[key]
        found["bottleneck"] |= ONE_FOR_ALL
        path.write_text(json.dumps(values))
    for command in commands:
        done = cli(*command)
        assert done.returncode == 0, done.stderr
        assert "already finished" in done.stderr
    assert (lam / "model.safetensors").stat().st_mtime_ns == saved
    moved = lam.rename(tmp_path / "moved")
    done = cli("label", "--lam", moved, "--data", blocks, "--out", labels)
    assert "already finished" in done.stderr, done.stderr


def test_unknown_names_stay_unknown(blocks: Path, tmp_path: Path) -> None:
    done = cli("train-lam", f"data.path={blocks}", *TINY_LAM, "labelled_episode=2", f"out={tmp_path}/lam")
    assert done.returncode == 2
    assert "labelled_episode" in done.stderr
    assert not (tmp_path / "lam").exists()


def test_names_are_renamed_at_every_level() -> None:
    older = {"labelled_episodes": 3, "policy": {"kind": "bc", "network": {"frames": 2, "chunk": 4}}}
    assert current_names(TrainPolicyConfig, older) == {
        "labeled_episodes": 3,
        "policy": {"kind": "bc", "network": {"n_obs_steps": 2, "chunk_size": 4}},
    }
