"""A policy of an outside package with a network of its own, one file, goes through every stage."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from outside import OutsidePackage

pytestmark = pytest.mark.slow

OUTSIDE = '''
"""A small transformer over image patches that predicts latent actions or robot actions."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from latentact.policies.contract import POLICIES, Policy
from latentact.policies.spec import Targets, latent_action_target, robot_action_target


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """Settings of the network."""

    width: int = 16
    """Width of a token."""
    patch: int = 8
    """Side of a patch in pixels."""
    n_obs_steps: int = 2
    """Observed frames."""
    chunk_size: int = 3
    """Targets predicted at once."""
    n_action_steps: int = 2
    """Targets executed before the policy observes again."""
    use_state: bool = False
    """Whether the network takes the robot state."""


@POLICIES.register("outside")
@dataclass(frozen=True, kw_only=True)
class OutsideConfig:
    """Settings."""

    kind: str = "outside"
    """Registered name."""
    network: TransformerSettings = field(default_factory=TransformerSettings)
    """The network."""
    column: str = "continuous"
    """action: robot actions; continuous, vectors or codes: latent actions."""

    def targets(self, latent, actions):
        if self.column == "action":
            return Targets(column="action", target=robot_action_target(actions, self.kind))
        return Targets(column=self.column, target=latent_action_target(latent, self.column, self.kind))

    def behavior_cloning(self):
        return replace(self, column="action")

    def build(self, spec, latent=None):
        return Transformer(self, spec, latent)


class Transformer(Policy):
    def __init__(self, config, spec, latent=None):
        super().__init__(config, spec, latent)
        n = config.network
        self.stem = nn.Conv2d(spec.channels, n.width, n.patch, n.patch)
        self.words = nn.Linear(len(spec.words) + 1, n.width)
        self.query = nn.Parameter(torch.randn(1, n.chunk_size, n.width))
        self.steps = nn.Parameter(torch.randn(n.n_obs_steps, 1, n.width))
        layer = nn.TransformerEncoderLayer(n.width, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(n.width, spec.target.outputs)

    def tokens(self, frames, words):
        x = self.normal_frames(frames)
        patches = self.stem(x.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
        patches = (patches + self.steps).flatten(1, 2)
        text = self.words(torch.cat([words, torch.ones_like(words[:, :1] if words.shape[1] else
                                                            frames.new_ones(len(frames), 1).float())], 1))
        return self.encoder(torch.cat([self.query.expand(len(x), -1, -1), patches, text[:, None]], dim=1))

    def features(self, frames, state, words):
        return self.tokens(frames, words)[:, 0]

    def forward(self, frames, state, words, guide=None):
        return self.head(self.tokens(frames, words)[:, : self.config.network.chunk_size]).float()
'''
CHECK = """
from latentact import check_policy
from latentact.policies.contract import POLICIES
from latentact.policies.spec import PolicySpec, Target
from latentact.types import ActionSpace

config = POLICIES.get("outside")(column="action")
actions = ActionSpace(kind="discrete", size=4)
target = config.targets(None, actions).target
check_policy(config.build(PolicySpec(resolution=32, words=("a", "b"), target=target, action_space=actions)))
"""
TINY = ["lam.backbone=patch", "lam.size=32", "lam.patch=8", "lam.idm_channels=[8]", "lam.fdm_channels=[8]"]
TINY += ["lam.bottleneck.kind=none", "lam.bottleneck.dim=4"]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OutsidePackage:
    return OutsidePackage(tmp_path, monkeypatch, "latentact.policies", OUTSIDE)


def test_every_stage_takes_it(outside: OutsidePackage, tmp_path: Path) -> None:
    outside.run(CHECK)
    data, short = ["data.path=data", "data.resolution=32"], ["training.steps=4", "training.batch_size=8"]
    env = ["--env", "babyai/GoToLocal", "--episodes", "2", "--max-steps", "6", "--record", "0"]
    labels, grounding = ["labels=labels", "policy=outside"], ["labels=labels", "labeled_episodes=2"]
    stages = ("lam", "idm", "policy", "decoder")
    training = [f"{stage}_training.{key}" for stage in stages for key in ("steps=4", "batch_size=8")]
    commands = [
        ["train-lam", *data, *TINY, *short, "out=lam"],
        ["label", "--lam", "lam", "--data", "data", "--out", "labels"],
        ["train-policy", *labels, *short, "out=latent"],
        ["train-policy", *data, "policy=outside", "policy.column=action", *short, "out=bc"],
        ["ground", "policy=latent", *grounding, *short, "finetune_steps=2", "out=ground"],
        ["rollout", "--policy", "ground/finetuned", *env, "--out", "rollout"],
        ["rollout", "--policy", "bc", *env, "--out", "rollout_bc"],
        [
            "compare",
            *data,
            "env=babyai/GoToLocal",
            *TINY,
            "policy=outside",
            "ks=[2]",
            "seeds=[0]",
            "episodes=2",
        ],
        ["imitate", "--video-path", "demo.mp4", "--lam-model-path", "lam", "--policy-path", "ground"],
    ]
    if importlib.util.find_spec("stable_baselines3"):
        commands += _online(data, short)
    commands[7] += [*training, "finetune_steps=2", "record=0", "methods=[latent,bc_k]", "out=compare"]
    commands[8] += ["--env-name", "babyai/GoToLocal", "--max-steps", "3", "--output-dir", "imitated"]
    outside.stages(*commands)
    for name in ("rollout", "rollout_bc"):
        assert json.loads((tmp_path / name / "rollout.json").read_text())["episodes"] == 2
    rows = json.loads((tmp_path / "compare/comparison.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"latent", "bc_k", "uniform", "frequencies"}
    assert json.loads((tmp_path / "imitated/metrics.json").read_text())["steps"] <= 3
    if importlib.util.find_spec("stable_baselines3"):
        grounded = json.loads((tmp_path / "online/ground.json").read_text())
        assert [*grounded["rows"]] == ["paired", "decoder", "finetuned", "scratch", "expert"]
        assert grounded["environment_steps"] == 32 + 32 + 16


def _online(data: list[str], short: list[str]) -> list[list[str]]:
    """Return the commands that ground a policy of one latent action per step by acting."""
    steps = ["policy.network.chunk_size=1", "policy.network.n_action_steps=1"]
    ppo = {"envs": 2, "rollout_steps": 8, "batch_size": 16, "epochs": 1, "steps": 32, "finetune_steps": 32}
    ppo |= {"play_steps": 16, "episodes": 2, "max_steps": 6, "env": "babyai/GoToLocal", "lam": "step_lam"}
    return [
        ["train-lam", *data, *TINY, *short, "frame_gap_s=0", "out=step_lam"],
        ["label", "--lam", "step_lam", "--data", "data", "--out", "step_labels"],
        ["train-policy", "labels=step_labels", "policy=outside", *steps, *short, "out=step_policy"],
        [
            *("ground", "mode=online", "policy=step_policy", "labels=step_labels", *short, "out=online"),
            *(f"online.{name}={value}" for name, value in ppo.items()),
        ],
    ]
