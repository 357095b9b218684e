"""`latentact dagger` and `latentact gail` through the command line, at toy size."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import cli, refused
from latentact.data.cache import DataConfig, open_store
from latentact.envs.spec import env_spec
from latentact.policies.contract import Policy
from latentact.policies.decoder import DecoderConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec
from latentact.types import LatentActionSpec

TINY = ("training.steps=20", "training.batch_size=16", "training.checkpoint_every=20", "episodes=2")
STATE = ("policy.network.backbone=state", "policy.network.hidden=[8]", *TINY)
DAGGER = ("dagger", "env=CartPole-v1", *STATE, "learner.labels=[20,60]", "learner.beta=0.5")


def ok(*arguments):
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def made(folder):
    """Return file -> hash of what a run decides: episodes, datasets, weights and evaluations."""
    files = [p for p in folder.rglob("*") if p.suffix in (".npz", ".npy", ".parquet", ".safetensors")]
    files += [*folder.rglob("round.json"), *folder.rglob("meta/*.json")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def dagger(tmp_path_factory):
    out = tmp_path_factory.mktemp("dagger") / "run"
    done = ok(*DAGGER, f"out={out}", "--json")
    return out, json.loads(done.stdout.splitlines()[-1])


def test_dagger_leaves_a_dataset_a_curve_and_a_verdict(dagger, tmp_path):
    out, printed = dagger
    written = json.loads((out / "learner.json").read_text())
    assert printed == {"command": "dagger", **written}
    rows = [(row["method"], row["labels"]) for row in written["rows"]]
    assert rows == [("expert", None), ("dagger", 20), ("dagger", 60), ("bc", 20), ("bc", 60)]
    assert written["rows"][0]["return"] == 500
    assert "behavior cloning" in written["verdict"]
    data = out / "seed0/dagger/data"
    store = open_store(DataConfig(path=str(data), resolution=16))
    executed, own, labeled = (
        store.column(name).ravel() for name in ("executed_action", "intervention", "labeled")
    )
    actions = np.ma.getdata(store.actions(range(store.num_episodes)))
    assert labeled.sum() == 60
    assert (executed[own] == actions[own]).all()
    assert 0 < own.mean() < 1
    info = json.loads((data / "meta/info.json").read_text())["features"]
    assert info["intervention"] == {"dtype": "bool", "shape": [1], "names": None}
    before = made(out)
    assert json.loads(ok(*DAGGER, f"out={out}", "--json").stdout.splitlines()[-1])["rows"] == written["rows"]
    assert made(out) == before
    ok("report", str(out))
    page = (out / "report.html").read_text()
    assert "labels of the expert" in page
    assert "Behavior cloning" in page
    assert json.loads((out / "report.json").read_text())["verdict"] == written["verdict"]
    policy = ("train-policy", "policy=bc", f"data.path={data}", "data.resolution=16", *STATE[:-1])
    ok(*policy, "only=intervention", "held_out=0", f"out={tmp_path / 'own'}")
    counted = json.loads((tmp_path / "own/policy.json").read_text())
    assert counted["samples"] == own.sum()
    refused = cli(*policy, "only=no_such", f"out={tmp_path / 'none'}")
    assert refused.returncode == 2
    assert "must have the column 'no_such'" in refused.stderr


@pytest.mark.slow
def test_a_killed_dagger_ends_with_the_same_bytes(dagger, tmp_path):
    whole, out = dagger[0], tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "latentact", *DAGGER, f"out={out}"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (out / "seed0/dagger/round1.partial").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ok(*DAGGER, f"out={out}")
    assert {k: v for k, v in made(out).items() if "checkpoints" not in k} == {
        k: v for k, v in made(whole).items() if "checkpoints" not in k
    }


def test_dagger_fine_tunes_a_grounded_latent_policy(tmp_path):
    env = env_spec("babyai/GoToRedBall")
    meaning = LatentActionSpec(
        model="lapo",
        tokens=1,
        token_dim=2,
        codebook_size=None,
        frame_gap=1,
        frame_gap_s=0.1,
        fps=10.0,
        resolution=56,
        camera=env.camera,
        weights="1",
    )
    torch.manual_seed(0)
    latent = LatentConfig(network=NetworkConfig(backbone="patch", channels=(8,)))
    target = latent.targets(meaning, None).target
    spec = PolicySpec(resolution=56, state_size=7, target=target, camera=env.camera, fps=10.0)
    grounded = latent.build(spec, meaning).ground(DecoderConfig(hidden=(8,)), env.action_space)
    grounded.save_pretrained(tmp_path / "start")
    command = ("dagger", "env=babyai/GoToRedBall", "policy=latent", *TINY, "learner.labels=[5,10]")
    ok(*command, f"start={tmp_path / 'start'}", f"out={tmp_path / 'out'}")
    tuned = Policy.from_pretrained(tmp_path / "out/seed0/dagger/labels10/policy")
    assert tuned.config.kind == "latent"
    assert not torch.equal(tuned.head.weight, grounded.head.weight)
    for kind in ("latent", "guided"):
        message = refused(*command, f"policy={kind}", f"out={tmp_path / 'none'}")
        assert f"policy={kind} must start from a policy that outputs robot actions" in message
    assert not (tmp_path / "none").exists()


def test_gail_leaves_policies_that_rollout_runs(tmp_path):
    pytest.importorskip("stable_baselines3")
    out = tmp_path / "run"
    small = (
        "learner.demos=1",
        "learner.steps=200",
        "learner.envs=2",
        "learner.rollout_steps=32",
        "learner.batch_size=64",
    )
    command = ("gail", "env=CartPole-v1", *STATE[1:], *small, "learner.horizon=40", f"out={out}")
    ok(*command)
    written = json.loads((out / "learner.json").read_text())
    assert [row["method"] for row in written["rows"]] == ["expert", "bc", "gail", "control"]
    assert "The control" in written["verdict"]
    assert not [path for path in out.rglob("*") if path.suffix in (".zip", ".pkl", ".pt", ".pth")]
    lines = (out / "seed0/gail/metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,train/return")
    assert len(lines) == 5  # 200 steps are four rollouts of 2 x 32
    weights = (out / "seed0/gail/policy/model.safetensors").read_bytes()
    for name in ("learner.json", "seed0/gail/policy/config.json"):  # as if it had been killed there
        (out / name).unlink()
    ok(*command)
    assert (out / "seed0/gail/policy/model.safetensors").read_bytes() == weights
    policy = out / "seed0/gail/policy"
    done = ok(
        "rollout", "--policy", policy, "--env", "CartPole-v1", "--episodes", "2", "--out", tmp_path / "r"
    )
    assert "return" in done.stdout
    ok("report", str(out))
    assert "worthless" in (out / "report.html").read_text()


def test_gail_refuses_environments_that_end_by_success(tmp_path):
    pytest.importorskip("stable_baselines3")
    refused = cli("gail", "env=babyai/GoToRedBall", f"out={tmp_path / 'out'}", *TINY)
    assert refused.returncode == 2
    assert "learner.horizon must be set" in refused.stderr
    assert not (tmp_path / "out").exists(), "nothing is written"
