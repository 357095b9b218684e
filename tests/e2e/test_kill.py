"""`kill -9` at a random moment: the same command again ends as if nothing had happened."""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY_LAM, ok, start, write_blocks
from toy_lerobot import SMALL, write_demonstrations, write_lam

pytestmark = pytest.mark.slow
ATTEMPTS = 5


def kill(command, ready, seed, folder, by=signal.SIGKILL, within=0.1):
    """Start a command, wait until `ready()`, up to `within` seconds longer, and kill all of its processes.

    Returns:
        The exit code and what it printed.
    """
    process = start(*command, log=folder / "log.txt")
    deadline = time.monotonic() + 300
    while not ready() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(np.random.default_rng(seed).uniform(0, within))
    if process.is_alive():
        os.killpg(process.pid, by)
    process.join()
    return process.exitcode, (folder / "log.txt").read_text()


def killed(command, ready, seed, result):
    """Kill a command before it has its result; fast machines need more attempts and less patience."""
    for attempt in range(ATTEMPTS):
        with tempfile.TemporaryDirectory() as folder:
            code, log = kill(command, ready, seed + attempt, Path(folder), within=0.1 / 4**attempt)
        assert code in (0, -signal.SIGKILL), log
        if not result.exists():
            return
        shutil.rmtree(result.parent)
    raise AssertionError("it finished before it could be killed")


def contents(folder):
    """Return file name -> hash; of videos the name only, as x264 encodes equal frames to other bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".mp4")
    videos = dict.fromkeys((str(path.relative_to(folder)) for path in folder.rglob("*.mp4")), "")
    return videos | {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def filled(folder, pattern, size=1):
    """Whether there is a file of at least this size."""
    return lambda: any(path.is_file() and path.stat().st_size >= size for path in folder.glob(pattern))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """300 episodes of 41 steps: fifty parts of labels."""
    return write_blocks(tmp_path_factory.mktemp("data") / "blocks.npz", episodes=300, steps=41)


@pytest.fixture(scope="module")
def entry(data, tmp_path_factory):
    """The cache entry of an undisturbed build."""
    there = tmp_path_factory.mktemp("entry")
    ok("cache", "--data", data, "--resolution", "32", "--cache-dir", there)
    (found,) = (path for path in there.iterdir() if (path / "meta.json").is_file())
    return found


@pytest.mark.parametrize("size", [1, 10_000_000])
def test_cache(size, data, entry, tmp_path):
    command = ("cache", "--data", data, "--resolution", "32", "--cache-dir", tmp_path)
    killed(command, filled(tmp_path, "*.partial/frames", size), size, tmp_path / entry.name)
    ok(*command)
    assert contents(tmp_path / entry.name) == contents(entry)
    assert not [*tmp_path.glob("*.partial")]


def training(data, out):
    often = ("training.steps=60", "training.checkpoint_every=4", "training.eval_every=20")
    return ("train-lam", f"data.path={data}", *TINY_LAM, *often, f"out={out}")


@pytest.fixture(scope="module")
def lam(tmp_path_factory, blocks):
    """A LAM that was trained without a break."""
    out = tmp_path_factory.mktemp("lam") / "lam"
    ok(*training(blocks, out))
    return out


@pytest.mark.parametrize("pattern", ["config.yaml", "checkpoints/step=*/state.json"])
def test_train_lam(pattern, blocks, lam, tmp_path):
    command = training(blocks, tmp_path / "cut")
    killed(command, filled(tmp_path / "cut", pattern), len(pattern), tmp_path / "cut/lam.json")
    ok(*command)
    whole, cut = contents(lam), contents(tmp_path / "cut")
    for name in ("model.safetensors", "lam.json", "metrics.csv", "config.yaml"):
        assert cut[name] == whole[name], name
    checkpoints = [path.name for path in (tmp_path / "cut/checkpoints").glob("step=*")]
    assert checkpoints == ["step=00000060"]


def test_ctrl_c_says_how_to_go_on(blocks, lam, tmp_path):
    ready, command = filled(tmp_path, "cut/checkpoints/step=*/state.json"), training(blocks, tmp_path / "cut")
    code, log = kill(command, ready, 0, tmp_path, signal.SIGINT)
    assert code == 130
    assert log.splitlines()[-1] == "interrupted; re-run the command to resume"
    assert "Traceback" not in log
    ok(*command)
    assert contents(tmp_path / "cut")["model.safetensors"] == contents(lam)["model.safetensors"]


@pytest.fixture(scope="module")
def labels(data, lam, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "labels"
    ok("label", "--lam", lam, "--data", data, "--out", out)
    return out


@pytest.mark.parametrize("pattern", ["*.partial/00000000.safetensors", "*.partial/00000020.safetensors"])
def test_label(pattern, data, lam, labels, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTACT_CACHE", str(tmp_path / "cache"))
    command = ("label", "--lam", lam, "--data", data, "--out", tmp_path / "cut")
    killed(command, filled(tmp_path / "cache/tokens", pattern), len(pattern), tmp_path / "cut")
    ok(*command)
    assert contents(tmp_path / "cut") == contents(labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cut"]
    assert not [*tmp_path.glob("cache/tokens/*.partial")]


def token_training(data, out):
    settings = (*SMALL["act"].items(), ("pretrained_backbone_weights", "null"))
    small = [part for key, value in settings for part in ("--policy-override", f"{key}={value}")]
    how = ("--policy", "lam_act", "--num-epochs", "6", "--batch-size", "18", *small)
    return ("train-with-tokens", "--dataset-root", data, "--output-dir", out, *how)


def test_train_with_tokens(tmp_path):
    data, out = tmp_path / "tokens", tmp_path / "cut"
    given = (
        "--dataset-root",
        write_demonstrations(tmp_path),
        "--lam-model-path",
        write_lam(tmp_path / "lam"),
    )
    ok("precompute", *given, "--output-dir", data)
    ok(*token_training(data, tmp_path / "whole"))
    command = token_training(data, out)
    killed(command, filled(out / "checkpoints", "last/*/*"), 0, out / "train_with_tokens.json")
    ok(*command)
    whole, cut = contents(tmp_path / "whole"), contents(out)
    kept = {name for name in whole if name.endswith((".safetensors", "_step.json", "metrics.csv"))}
    assert {name: cut[name] for name in kept} == {name: whole[name] for name in kept}
    assert cut.keys() == whole.keys()


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    out = tmp_path_factory.mktemp("collect") / "data"
    ok("collect", "babyai/GoToLocal", "--episodes", "6", "--workers", "1", "--out", out)
    return out


def comparing(data, out):
    sizes = ("lam.idm_channels=[16]", "lam.fdm_channels=[16]", "policy.network.channels=[16]")
    steps = (
        *("lam_training.steps=40", "lam_training.checkpoint_every=5", "lam_training.eval_every=0"),
        *("policy_training.steps=40", "policy_training.checkpoint_every=5", "decoder_training.steps=20"),
        *("finetune_steps=10", "lam_training.batch_size=16", "policy_training.batch_size=16"),
    )
    what = ("env=babyai/GoToLocal", "methods=[latent,bc_k]", "ks=[2]", "episodes=2", "record=1")
    return ("compare", "experiment=babyai", f"data.path={data}", *what, *sizes, *steps, f"out={out}")


@pytest.fixture(scope="module")
def undisturbed(demonstrations, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "compare"
    ok(*comparing(demonstrations, out))
    return out


@pytest.mark.parametrize(
    "pattern",
    [
        "seed0/latent/lam/checkpoints/step=*/state.json",
        "seed0/latent_k2/grounded/ground.json",
    ],
)
def test_compare(pattern, demonstrations, undisturbed, tmp_path):
    command = comparing(demonstrations, tmp_path / "cut")
    killed(command, filled(tmp_path / "cut", pattern), len(pattern), tmp_path / "cut/comparison.json")
    ok(*command)
    whole, cut = contents(undisturbed), contents(tmp_path / "cut")
    for name in ("comparison.json", "comparison.csv", "comparison.svg"):
        assert cut[name] == whole[name], name
    kept = ("model.safetensors", "lam_tokens.safetensors", ".mp4")
    weights = {name for name in whole if name.endswith(kept)}
    assert len(weights) == 11  # a LAM, labels, three policies and one that was tuned; a video of each row
    assert {name: cut[name] for name in weights} == {name: whole[name] for name in weights}
    numbers = json.loads((tmp_path / "cut/comparison.json").read_text())
    assert [row["method"] for row in numbers["rows"]] == ["latent", "bc_k", "uniform", "frequencies"]


def vla_training(command, out, *settings):
    often = ("training.steps=12", "training.batch_size=4", "training.checkpoint_every=2", "eval_rows=8")
    more = ("training.log_every=1", "training.eval_every=0", "training.device=cpu", *settings)
    return (command, "experiment=vla_debug", *often, *more, f"out={out}")


def test_vla(blocks, lam, tmp_path):
    """Both stages; the second begins from the result of the first."""
    labels, vla = tmp_path / "labels", tmp_path / "vla"
    ok("label", "--lam", lam, "--data", blocks, "--out", labels)
    decoder = ("pseudo_labels=true", "decoder_training.steps=5")
    for name, settings in (
        ("train-vla", (f"labels={labels}",)),
        ("finetune-vla", (f"labels={labels}", f"vla={vla}", "labeled_episodes=2", *decoder)),
    ):
        whole, cut = vla if name == "train-vla" else tmp_path / "finetuned", tmp_path / "cut" / name
        ok(*vla_training(name, whole, *settings))
        command = vla_training(name, cut, *settings)
        killed(command, filled(cut, "checkpoints/step=*/state.json"), len(name), cut / "config.json")
        assert not (cut / "config.json").exists()
        ok(*command)
        found, expected = contents(cut), contents(whole)
        kept = {path for path in expected if "tensorboard" not in path}
        assert {path: found.get(path) for path in kept} == {path: expected[path] for path in kept}
        assert {"metrics.csv", "model.safetensors", "vlm/model.safetensors"} < kept
        assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step=00000012"]
        assert not [path for path in cut.rglob("*") if "partial" in path.name]
