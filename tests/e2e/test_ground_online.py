"""`latentact ground mode=online` on a toy: an edge says which action pays, and a latent is its direction."""

import csv
import importlib.util
import json

import gymnasium
import numpy as np
import pytest

from conftest import TINY_POLICY, ok, refused
from latentact.data.cache import DataConfig, open_store
from latentact.data.latents import Labels, write_labels
from latentact.policies.contract import Policy
from latentact.policies.network import NetworkPolicy
from latentact.types import LatentActionSpec
from toy_env import toy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("stable_baselines3") is None, reason="needs stable-baselines3"
)
WAYS = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)], np.float32)
PAYS = (2, 0, 3, 1)
"""Action that pays when the edge of a number is bright."""
IMAGE = gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)
SMALL = ("online.envs=8", "online.rollout_steps=16", "online.batch_size=64", "online.episodes=10")


def frame(edge):
    picture = np.full((32, 32, 3), 40, np.uint8)
    area = [(slice(0, 4), slice(None)), (slice(28, 32), slice(None))]
    picture[[*area, *[(columns, rows) for rows, columns in area]][edge]] = (250, 200, 60)
    return picture


def edges():
    """Register the environment: eight frames, each with the reward of the action taken at the one before."""

    def observe(env):
        env.before = getattr(env, "edge", 0)
        env.edge = int(np.random.default_rng((env.seed or 0, env.steps)).integers(4))
        return frame(env.edge)

    def step(env, default):
        return (default[0], float(PAYS[env.before] == env.taken[-1]), False, False, {})

    return toy(
        "Edges-v0",
        action=gymnasium.spaces.Discrete(4),
        observation=IMAGE,
        limit=8,
        step=step,
        observe=observe,
    )


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """Folders of labels and of a latent policy that knows the direction of the bright edge."""
    root = tmp_path_factory.mktemp("online")
    shown = np.random.default_rng(0).integers(4, size=240)
    done = np.arange(240) % 12 == 11
    np.savez(root / "video.npz", obs=np.stack([frame(edge) for edge in shown]), done=done, fps=10)
    data = DataConfig(path=str(root / "video.npz"), resolution=32)
    store, valid = open_store(data), ~done
    vectors = np.ascontiguousarray(WAYS[shown][:, None]) * valid[:, None, None]
    spec = LatentActionSpec(
        model="lapo", tokens=1, token_dim=2, codebook_size=None, frame_gap=1, frame_gap_s=0.1, fps=10.0,
        resolution=32, camera=store.camera,
    )  # fmt: skip
    labels = Labels(spec=spec, data=data, vectors=vectors, continuous=vectors, codes=None, valid=valid)
    write_labels(root / "labels", labels, store.digest, {})
    ok("train-policy", f"labels={root}/labels", *TINY_POLICY, "training.steps=80", "training.lr=3e-3",
       "policy.network.patch=8", f"out={root}/policy")  # fmt: skip
    return root


def command(root, out, *more):
    given = (f"policy={root}/policy", f"labels={root}/labels", f"out={out}")
    return ("ground", "mode=online", *given, f"online.env={edges()}", *SMALL, *more)


def test_a_decoder_is_learned_from_reward_and_scratch_is_beside_it(latent, tmp_path):
    out = tmp_path / "run"
    typed = command(
        latent, out, "online.steps=1024", "online.finetune_steps=128", "online.lr=8e-3", "online.epochs=12"
    )
    ok(*typed)
    result = json.loads((out / "ground.json").read_text())
    assert [*result["rows"]] == ["decoder", "finetuned", "scratch"]
    assert result["environment_steps"] == 1152
    assert result["rows"]["decoder"]["return"] > 6  # of 8; a random action has 2
    assert "PPO from scratch after 1152 environment steps each; return: the decoder" in result["verdict"]
    assert {path.name for path in out.glob("*.csv")} >= {"decoder.csv", "finetuned.csv", "scratch.csv"}
    with (out / "decoder.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert int(rows[-1]["step"]) == 1024
    assert float(rows[-1]["train/return"]) > float(rows[0]["train/return"]) + 1
    before, after = (Policy.from_pretrained(folder) for folder in (out, out / "finetuned"))
    frozen = Policy.from_pretrained(latent / "policy").state_dict()
    assert all(np.array_equal(before.state_dict()[key], value) for key, value in frozen.items())
    assert not np.array_equal(after.state_dict()["head.weight"], frozen["head.weight"])
    ok("rollout", "--policy", out / "finetuned", "--env", "Edges-v0", "--episodes", "2", "--record", "0",
       "--out", tmp_path / "rollout")  # fmt: skip
    # As if it had been killed in the fine-tuning: what follows is the same.
    kept = (out / "config.json").stat().st_mtime_ns
    weights = [(out / name / "model.safetensors").read_bytes() for name in ("finetuned", "scratch")]
    for name in ("ground.json", "finetuned/config.json"):
        (out / name).unlink()
    ok(*typed)
    assert (out / "config.json").stat().st_mtime_ns == kept
    assert [(out / name / "model.safetensors").read_bytes() for name in ("finetuned", "scratch")] == weights
    assert json.loads((out / "ground.json").read_text()) == result


def test_what_cannot_be_learned_from_is_one_sentence(latent, tmp_path, monkeypatch):
    out = tmp_path / "run"
    given = ("ground", "mode=online", f"policy={latent}/policy", f"labels={latent}/labels", f"out={out}")
    assert "online.env must be set" in refused(*given)
    assert "mode must be offline or online, got 'on'" in refused(*given, "mode=on")
    assert "online.epochs must be between 1 and 1000, got 0" in refused(*given, "online.epochs=0")
    edges()
    long = (
        "train-policy",
        f"labels={latent}/labels",
        *TINY_POLICY,
        "training.steps=1",
        f"out={tmp_path}/long",
    )
    ok(*long, "policy.network.chunk_size=2")
    said = refused("ground", "mode=online", f"policy={tmp_path}/long", *given[3:], "online.env=Edges-v0")
    assert "one latent action per environment step" in said
    with monkeypatch.context() as patch:
        patch.setattr(NetworkPolicy, "actions", lambda policy, batch, choose: None, raising=False)
        message = refused(*given, "online.env=Edges-v0")
        assert "selected from the outputs of `forward`" in message
        assert f"got {latent}/policy, which overrides actions. Use mode=offline." in message
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if "baselines3" in name else find(name, *more)
    )
    assert "latentact[gail]" in refused(*given, "online.env=Edges-v0")
    assert not out.exists()
    monkeypatch.undo()
    ok(*given, "online.env=Edges-v0", "smoke_test=true")
    assert json.loads((out / "ground.json").read_text())["environment_steps"] == 64
