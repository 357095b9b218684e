"""Video in, a policy that acts out, through the command line: what every stage leaves on disk."""

import csv
import hashlib
import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from test_export import write_moves

from conftest import TINY_LAM, TINY_POLICY, contents, latentact, ok, refused
from latentact.agents.load import load_agent
from latentact.agents.own import PolicyActor
from latentact.data.cache import DataConfig, open_store
from latentact.data.latents import read_labels
from latentact.data.splits import choose_labeled, split_episodes
from latentact.io.video_writer import write_video
from latentact.lams.contract import load_lam
from latentact.policies.contract import Policy

EPISODES, STEPS = 8, 12
BOTTLENECKS = {
    "vq_ema": ("lam.bottleneck.dim=16", "lam.bottleneck.codebooks=2", "lam.bottleneck.positions=2"),
    "none": ("lam.bottleneck.dim=4",),
    "kl": ("lam.bottleneck.dim=4",),
    "fsq": ("lam.bottleneck.positions=2", "lam.bottleneck.levels=[4,4]"),
}


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row.pop("step")): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, blocks):
    """The whole chain: folders `lam`, `labels`, `policy` and `ground`, and the command line of each."""
    root = tmp_path_factory.mktemp("pipeline")
    commands = {
        "lam": ("train-lam", f"data.path={blocks}", *TINY_LAM, "training.eval_every=15", f"out={root}/lam"),
        "labels": ("label", "--lam", root / "lam", "--data", blocks, "--out", root / "labels"),
        "policy": (
            *("train-policy", f"labels={root}/labels", *TINY_POLICY, "held_out=0.25"),
            *(
                "policy.network.n_obs_steps=2",
                "policy.network.chunk_size=3",
                "policy.network.n_action_steps=2",
            ),
            f"out={root}/policy",
        ),
        "ground": (
            *("ground", f"policy={root}/policy", f"labels={root}/labels", "labeled_episodes=2"),
            *("held_out=0.25", "training.steps=30", "training.batch_size=16", "finetune_steps=5"),
            f"out={root}/ground",
        ),
    }
    for command in commands.values():
        ok(*command)
    return root, commands


def test_lam_run(runs):
    out = runs[0] / "lam"
    numbers = json.loads((out / "lam.json").read_text())
    rows = metrics(out)
    assert [*rows] == [1, 10, 15, 20, 30]
    assert all(float(rows[step]["train/loss"]) > 0 for step in (1, 10, 20, 30))
    assert rows[15]["train/loss"] == ""
    assert float(rows[30]["val/recon_mse"]) == pytest.approx(numbers["recon_mse"], rel=1e-4)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step=00000030"]
    assert yaml.safe_load((out / "config.yaml").read_text())["training"]["steps"] == 30
    model = load_lam(out)
    assert (
        model.spec.weights
        == hashlib.blake2b((out / "model.safetensors").read_bytes(), digest_size=16).hexdigest()
    )
    assert (model.spec.frame_gap, model.spec.frame_gap_s, model.spec.fps) == (1, 0.1, 10.0)
    assert numbers["spec"] == json.loads((out / "spec.json").read_text())
    arrays = np.load(out / "lam.npz")
    assert arrays["vectors"].shape == (STEPS - 1, 4)  # one held-out episode
    assert arrays["action"].shape == (STEPS - 1,)


def test_labels(runs, blocks):
    out = runs[0] / "labels"
    arrays = load_file(out / "lam_tokens.safetensors")
    rows = EPISODES * STEPS
    assert set(arrays) == {"vectors", "continuous", "valid"}
    assert arrays["vectors"].shape == arrays["continuous"].shape == (rows, 1, 4)
    assert arrays["vectors"].dtype == np.float32
    assert not arrays["valid"].reshape(EPISODES, STEPS)[:, -1].any()
    assert arrays["valid"].reshape(EPISODES, STEPS)[:, :-1].all()
    assert not arrays["vectors"][~arrays["valid"]].any()
    manifest, lam = (
        json.loads((runs[0] / name).read_text()) for name in ("labels/manifest.json", "lam/spec.json")
    )
    assert manifest["spec"] == lam
    assert manifest["rows"] == rows
    assert [path.name for path in runs[0].iterdir() if "partial" in path.name] == []
    # A label is what the model says of the frames of that row.
    model, (labels, store) = load_lam(runs[0] / "lam"), read_labels(out)
    import torch

    row = 2 * STEPS + 5
    frames = torch.from_numpy(np.array(store.frames[row - 1 : row + 2])).permute(0, 3, 1, 2)[None]
    assert np.allclose(model.encode(frames).vectors[0, -1].numpy(force=True), labels.vectors[row], atol=1e-5)


def test_policy_run(runs):
    out = runs[0] / "policy"
    policy = Policy.from_pretrained(out)
    assert [*metrics(out)] == [1, 10, 20, 30]
    assert policy.latent is not None
    assert policy.latent == load_lam(runs[0] / "lam").spec
    assert policy.spec.action_space is None
    result = json.loads((out / "policy.json").read_text())
    assert result["episodes"] == 6
    assert result["samples"] == 6 * (STEPS - 1)
    assert result["val/loss"] == pytest.approx(float(metrics(out)[30]["val/loss"]), rel=1e-4)
    labels, store = read_labels(runs[0] / "labels")
    train, _ = split_episodes(store, held_out=0.25, seed=0)
    seen = labels.continuous[labels.valid & np.isin(store.episode, train)].reshape(-1, 4)
    assert np.allclose(policy.mean, seen.mean(0), atol=1e-5)


def test_grounded_policy_acts(runs, blocks):
    out = runs[0] / "ground"
    result = json.loads((out / "ground.json").read_text())
    assert result["labeled_steps"] == 2 * (STEPS - 1)
    assert 0 <= result["held_out_score"] <= 1
    assert result["finetuned"] == "finetuned"
    store = open_store(DataConfig(path=str(blocks), resolution=32))
    frames = np.asarray(store.frames[store.starts])
    latent, grounded = Policy.from_pretrained(runs[0] / "policy"), Policy.from_pretrained(out)
    for name, values in latent.state_dict().items():  # grounding leaves the network alone
        assert (grounded.state_dict()[name] == values).all()
    for folder in (out, out / "finetuned"):
        actor = PolicyActor(Policy.from_pretrained(folder))
        actor.reset(EPISODES)
        for _ in range(5):
            actions = actor.act(frames, None, [""] * EPISODES)
            assert actions.shape == (EPISODES,)
            assert actions.dtype == np.int64
            assert set(actions) <= {0, 1, 2, 3}


def test_report(runs):
    ok("report", runs[0] / "lam")
    report = json.loads((runs[0] / "lam/report.json").read_text())
    numbers = json.loads((runs[0] / "lam/lam.json").read_text())
    assert {key: report["lam"][key] for key in ("recon_mse", "copy_mse", "shuffled_mse")} == {
        key: numbers[key] for key in ("recon_mse", "copy_mse", "shuffled_mse")
    }
    page = (runs[0] / "lam/report.html").read_text()
    assert report["verdict"].partition(".")[0] in page
    assert "<link" not in page


@pytest.mark.parametrize("stage", ["lam", "labels", "policy", "ground"])
def test_same_command_again_changes_nothing(runs, stage):
    root, commands = runs
    before = contents(root / stage)
    done = ok(*commands[stage])
    assert "already finished" in done.stderr
    assert contents(root / stage) == before


@pytest.mark.parametrize(
    ("stage", "setting", "words"),
    [
        ("lam", ("training.lr=0.5",), "training.lr = 0.0003, not 0.5"),
        ("lam", ("lam.bottleneck.dim=5",), "lam.bottleneck.dim = 4, not 5"),
        ("labels", ("--target-fps", "5"), "got labels with other settings"),
        ("policy", ("policy.target=vectors",), "policy.target = 'continuous', not 'vectors'"),
        ("ground", ("labeled_episodes=3",), "labeled_episodes = 2, not 3"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(runs, stage, setting, words):
    root, commands = runs
    before = contents(root / stage)
    assert words in refused(*commands[stage], *setting)
    assert contents(root / stage) == before


def test_labels_of_another_lam_are_refused(runs, blocks, tmp_path):
    root, _ = runs
    ok("train-lam", f"data.path={blocks}", *TINY_LAM, "training.seed=1", f"out={tmp_path}/lam")
    ok("label", "--lam", tmp_path / "lam", "--data", blocks, "--out", tmp_path / "labels")
    message = refused(
        "ground", f"policy={root}/policy", f"labels={tmp_path}/labels", f"out={tmp_path}/ground"
    )
    assert "weights of the latent actions must be the same in the policy and the labels" in message
    assert not (tmp_path / "ground").exists()


@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_every_bottleneck(kind, blocks, tmp_path):
    settings = (*TINY_LAM, f"lam.bottleneck.kind={kind}", *BOTTLENECKS[kind], "training.steps=5")
    ok("train-lam", f"data.path={blocks}", *settings, f"out={tmp_path}/lam")
    ok("label", "--lam", tmp_path / "lam", "--data", blocks, "--out", tmp_path / "labels")
    labels, _ = read_labels(tmp_path / "labels")
    assert np.isfinite(labels.vectors).all()
    assert (labels.codes is not None) == (kind in ("vq_ema", "fsq"))
    assert (json.loads((tmp_path / "lam/lam.json").read_text())["codebook"] is not None) == (
        labels.codes is not None
    )
    if labels.codes is not None:
        assert labels.codes.shape == (EPISODES * STEPS, labels.spec.tokens)
        assert labels.codes.max() < labels.spec.codebook_size
        assert not labels.codes[~labels.valid].any()
        codes = ("policy.target=codes", "training.steps=3", f"out={tmp_path}/policy")
        ok("train-policy", f"labels={tmp_path}/labels", *TINY_POLICY, *codes)
        few = ("labeled_episodes=2", "training.steps=3", f"out={tmp_path}/ground")
        ok("ground", f"policy={tmp_path}/policy", f"labels={tmp_path}/labels", *few)
    else:
        target = ("policy.target=codes", f"out={tmp_path}/policy")
        assert "which have no codes, got codes" in refused(
            "train-policy", f"labels={tmp_path}/labels", *TINY_POLICY, *target
        )
        assert not (tmp_path / "policy").exists()


def test_idm_labels_train_bc(blocks, tmp_path):
    """IDM-k: an inverse dynamics model on k labeled episodes writes pseudo-actions from which BC learns."""
    small = ("lam=idm", "lam.backbone=patch", "lam.size=32", "lam.patch=4", "lam.channels=[16]")
    long = ("data.resolution=32", "training.steps=150", "training.batch_size=32", "training.lr=3e-3")
    ok("train-lam", f"data.path={blocks}", *small, *long, "labeled_episodes=5", f"out={tmp_path}/idm")
    ok("label", "--lam", tmp_path / "idm", "--data", blocks, "--out", tmp_path / "labels")
    labels, store = read_labels(tmp_path / "labels")
    train, _ = split_episodes(store, held_out=0.1, seed=0)
    labeled = choose_labeled(train, 5, 0)
    known = labels.valid & np.isin(store.episode, labeled)
    assert labels.codes is not None
    right = labels.codes[known, 0] == store.actions(labeled)[known]
    assert right.mean() > 0.8  # a block at the wall does not move, whatever the action
    ok("train-policy", "policy=bc", f"labels={tmp_path}/labels", *TINY_POLICY, f"out={tmp_path}/policy")
    policy = Policy.from_pretrained(tmp_path / "policy")
    assert policy.spec.action_space == store.action_space
    assert policy.latent is None
    lapo = refused(
        "ground", f"policy={tmp_path}/policy", f"labels={tmp_path}/labels", f"out={tmp_path}/ground"
    )
    assert "must be a latent policy, got one that predicts robot actions" in lapo


def test_bc_on_robot_actions(blocks, tmp_path):
    data = (f"data.path={blocks}", "data.resolution=32", "labeled_episodes=3")
    ok("train-policy", "policy=bc", *data, *TINY_POLICY, f"out={tmp_path}/bc")
    assert json.loads((tmp_path / "bc/policy.json").read_text())["samples"] == 3 * (STEPS - 1)


@pytest.mark.slow
def test_a_longer_gap_and_a_sweep_in_a_real_process(blocks, tmp_path):
    sweep = (f"data.path={blocks}", *TINY_LAM, "training.steps=3", "frame_gap_s=0.3")
    done = latentact("train-lam", *sweep, "training.seed=0,1", f"out={tmp_path}/sweep", "--multirun")
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in (tmp_path / "sweep").rglob("lam.json"))
    assert len(runs) == 2
    ok("label", "--lam", runs[0], "--data", blocks, "--out", tmp_path / "labels")
    labels, _ = read_labels(tmp_path / "labels")
    assert (labels.spec.frame_gap, labels.spec.frame_gap_s) == (3, pytest.approx(0.3))
    assert labels.valid.reshape(EPISODES, STEPS).sum(1).tolist() == [STEPS - 3] * EPISODES


@pytest.mark.parametrize("use_state", [False, True])
def test_a_policy_of_plain_video_is_grounded_on_a_robot_with_a_state(plain, use_state):
    root, moves = plain
    out = root / f"ground_{use_state}"
    done = (f"decoder.use_state={use_state}", "training.steps=5", "finetune_steps=2", "self_training=true")
    ok(
        *("ground", f"policy={root}/policy", f"labels={root}/robot_labels", "labeled_episodes=3"),
        *(*done, f"out={out}"),
    )
    store = open_store(DataConfig(path=str(moves), resolution=32))
    for folder in (out, out / "finetuned"):
        agent = load_agent(folder)
        assert (agent.spec.cameras, agent.spec.state_size) == ((store.camera,), 2 if use_state else 0)
        observation = {
            store.camera: np.array(store.frames[:2]),
            "observation.state": store.state[:2],
            "task": ["", ""],
        }
        agent.reset(2)
        assert agent.act(observation).shape == (2, 2)
    if use_state:
        labeled = choose_labeled(split_episodes(store, held_out=0.1, seed=0)[0], 3, 0)
        states = store.state[np.isin(store.episode, labeled)]
        assert np.allclose(Policy.from_pretrained(out).state_mean.numpy(), states.mean(0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a policy of plain videos, and labels of a robot's dataset; and that dataset."""
    root = tmp_path_factory.mktemp("plain")
    moves = write_moves(root)
    store = open_store(DataConfig(path=str(moves), resolution=0))
    (root / "videos").mkdir()
    for number, start in enumerate(store.starts[:6]):
        frames = np.array(store.frames[start : start + store.lengths[number]])
        write_video(root / f"videos/{number}.mp4", frames, 10)
    short = ("training.steps=5", "training.batch_size=8", "training.eval_every=0")
    ok("train-lam", *TINY_LAM, *short, f"data.path={root}/videos", f"out={root}/lam")
    for data, labels in ((root / "videos", "labels"), (moves, "robot_labels")):
        ok("label", "--lam", root / "lam", "--data", data, "--out", root / labels)
    ok("train-policy", *TINY_POLICY, *short, f"labels={root}/labels", f"out={root}/policy")
    return root, moves
