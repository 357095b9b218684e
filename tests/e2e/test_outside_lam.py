"""A latent action model of an outside package, one file with an entry point, goes through every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import TINY_POLICY
from outside import OutsidePackage

pytestmark = pytest.mark.slow

OUTSIDE = '''
"""A latent action model in one file: the mean color of three cells, before and after."""

from dataclasses import dataclass

import torch
from torch import nn

from latentact.errors import UserError
from latentact.lams.contract import LAMS, LatentActionModel, transition_windows
from latentact.types import LatentActions


@LAMS.register("outside")
@dataclass(frozen=True, kw_only=True)
class OutsideConfig:
    """Settings."""

    kind: str = "outside"
    """Registered name."""
    width: int = 3
    """Dims of a latent action."""

    def build(self, actions=None):
        return Outside(self)

    def with_action_head(self, weight):
        return None


class Outside(LatentActionModel):
    generative = False

    def __init__(self, config):
        super().__init__(config)
        self.net = nn.Linear(96, config.width)
        self.back = nn.Linear(config.width, 48)
        self.spec = self._new_spec(32, tokens=1, token_dim=config.width, codebook_size=None)

    def cells(self, windows):
        return nn.functional.adaptive_avg_pool2d(windows.float().flatten(0, 1) / 255, 4).reshape(-1, 2, 48)

    def encode(self, frames, valid=None, last=False, states=None):
        windows, valid = transition_windows(frames, valid, 0, last)
        vectors = self.net(self.cells(windows).flatten(1)).reshape(*valid.shape, 1, self.config.width)
        return LatentActions(vectors=vectors, continuous=vectors, codes=None, valid=valid)

    def predict(self, frames, vectors):
        raise UserError("this model has no forward dynamics and predicts no frames. Use lam=lapo.")

    def loss(self, clip):
        cells = self.cells(clip.frames[:, -2:])
        change = self.back(self.net(cells.flatten(1)))
        loss = (cells[:, 1] - cells[:, 0] - change).square().mean()
        return loss, {"recon": loss.detach()}
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OutsidePackage:
    return OutsidePackage(tmp_path, monkeypatch, "latentact.lams", OUTSIDE)


CHECK = """
from latentact import check_lam
from latentact.lams.contract import LAMS
check_lam(LAMS.get("outside")(width=5).build())
"""
SMALL = (
    "policy.network.backbone=patch",
    "policy.network.channels=[8]",
    "idm.backbone=patch",
    "idm.size=32",
    "idm.channels=[8]",
    "policy_training.batch_size=16",
    "lam_training.batch_size=16",
    "lam_training.steps=10",
    "lam_training.eval_every=0",
    "idm_training.steps=10",
    "policy_training.steps=10",
    "decoder_training.steps=10",
    "finetune_steps=5",
    "episodes=2",
    "record=1",
)


def test_every_stage_takes_it(outside: OutsidePackage, tmp_path: Path) -> None:
    outside.run(CHECK)
    compare = ["compare", "data.path=data", "data.resolution=32", "env=babyai/GoToLocal", "lam=outside"]
    compare += ["ks=[2]", "seeds=[0]", "out=compare", *SMALL]
    commands = [
        [
            "train-lam",
            "data.path=data",
            "lam=outside",
            "training.steps=10",
            "training.batch_size=16",
            "out=lam",
        ],
        ["label", "--lam", "lam", "--data", "data", "--out", "labels"],
        ["inspect", "lam", "--data", "data", "--out", "inspected"],
        ["train-policy", "labels=labels", "out=policy", *TINY_POLICY],
        ["ground", "policy=policy", "labels=labels", "labeled_episodes=2", "training.steps=5", "out=ground"],
        [*compare, "methods=[latent,bc_k]"],
        ["precompute", "--dataset-root", "data", "--lam-model-path", "lam", "--output-dir", "tokens"],
        ["imitate", "--mode", "extract_only", "--video-path", "demo.mp4", "--lam-model-path", "lam"],
    ]
    commands[-1] += ["--output-dir", "guide"]
    outside.stages(*commands)
    assert len(json.loads((tmp_path / "compare/comparison.json").read_text())["rows"]) == 4
    assert (tmp_path / "guide/latents.safetensors").exists()
    refused = outside.stages([*compare, "out=joint"], code=2)
    assert "lam must support an action head for the row latent_joint" in refused
    assert "Set methods=[latent," in refused
    assert not (tmp_path / "joint").exists()
