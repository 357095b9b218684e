"""CLAM's parts by hand: several steps ahead, states, the joint action decoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import cli
from latentact.errors import UserError
from latentact.lams.contract import load_lam
from latentact.lams.models.clam import ClamConfig
from latentact.types import ActionSpace, Clip

SMALL = ClamConfig(
    size=32, backbone="patch", patch=4, idm_channels=(16,), fdm_channels=(16,), hidden=16, decoder=(16,)
)
STATE = replace(SMALL, observations="state", state_size=2)


def clip(steps: int = 1, b: int = 8, **more) -> Clip:
    t = 2 + steps
    frames = torch.randint(0, 256, (b, t, 3, 32, 32), dtype=torch.uint8)
    states = torch.randn(b, t, 2)
    valid = torch.ones(b, t, dtype=torch.bool)
    return Clip(frames=frames, valid=valid, index=torch.arange(b), states=states, **more)


def test_published_sizes() -> None:
    config = ClamConfig()
    assert (config.bottleneck.kind, config.bottleneck.dim, config.decoder) == ("none", 8, (1024, 1024, 1024))
    assert replace(SMALL, steps=3).build().horizon == 3


def test_a_prediction_takes_the_place_of_what_it_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an FDM that always adds one, the second step starts from its own answer and misses by that."""
    model = replace(STATE, steps=2).build().train()
    windows = []
    monkeypatch.setattr(model, "_states", lambda states: states)
    monkeypatch.setattr(model.state_fdm, "forward", lambda x: torch.ones(len(x), 2))
    infer = model._infer
    monkeypatch.setattr(model, "_infer", lambda window: windows.append(window) or infer(window))
    batch = clip(steps=2)
    batch = replace(batch, states=torch.tensor([0.0, 10, 20, 30]).view(1, 4, 1).expand(8, 4, 2))
    loss, metrics = model.loss(batch)
    assert windows[0].s[0, :, 0].tolist() == [0, 10, 20]
    assert windows[1].s[0, :, 0].tolist() == [10, 11, 30]  # 10 + 1 where 20 was
    # errors: 11 against 20, then 12 against 30; the mean of both
    torch.testing.assert_close(metrics["recon"], torch.tensor((9.0**2 + 18.0**2) / 2))
    torch.testing.assert_close(loss.detach(), metrics["recon"])


def test_pictures_are_replaced_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(SMALL, steps=2).build().train()
    windows = []
    infer = model._infer
    monkeypatch.setattr(model, "_infer", lambda window: windows.append(window.x) or infer(window))
    monkeypatch.setattr(model, "_predict_pixels", lambda x, latent: x[:, 1] * 0 + 0.25)
    batch = clip(steps=2)
    model.loss(batch)
    assert (windows[1][:, 1] == 0.25).all()
    torch.testing.assert_close(windows[1][:, 0], windows[0][:, 1])


def test_states_are_counted_in_their_own_deviations() -> None:
    model = STATE.build().train()
    states = torch.stack([torch.arange(100.0), 1e4 + torch.arange(100.0)], -1).view(20, 5, 2)
    seen = model._states(states)
    torch.testing.assert_close(seen.flatten(0, 1).mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen[..., 0], seen[..., 1], rtol=1e-3, atol=1e-3)


def test_a_model_of_states_refuses_to_work_without_them() -> None:
    model = STATE.build().eval()
    batch = clip()
    assert model.encode(batch.frames, states=batch.states).vectors.shape == (8, 2, 1, 8)
    assert model.encode(batch.frames[0], states=batch.states[0]).vectors.shape == (1, 2, 1, 8)
    for wrong, found in ((None, "none"), (torch.zeros(8, 3, 5), "5 values")):
        with pytest.raises(UserError, match=rf"must have the 2 values that the LAM clam uses, got {found}"):
            model.encode(batch.frames, states=wrong)


def test_a_model_of_pictures_does_not_look_at_states() -> None:
    model = SMALL.build().eval()
    batch = clip()
    assert torch.equal(model.encode(batch.frames).vectors, model.encode(batch.frames, states=None).vectors)
    assert not hasattr(model, "state_fdm")


def test_latents_of_states_change_with_the_next_state() -> None:
    torch.manual_seed(0)
    model = STATE.build().eval()
    batch = clip()
    changed = batch.states.clone()
    changed[:, 2] += 1
    before, after = (model.encode(batch.frames, states=s).vectors for s in (batch.states, changed))
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.isclose(before[:, 1], after[:, 1]).all(-1).any()


def test_the_decoder_learns_with_the_model() -> None:
    space = ActionSpace(kind="discrete", size=3)
    model = replace(SMALL, action_weight=1.0).build(space).train()
    batch = clip(action=torch.tensor([0, 1, 2, 0, 0, 0, 0, 0]), labeled=torch.arange(8) < 3)
    loss, metrics = model.loss(batch)
    torch.testing.assert_close(loss.detach(), metrics["recon"] + metrics["action"])
    action_only = replace(model.config, action_weight=1e6)
    model.config = action_only
    model.loss(batch)[0].backward()
    assert model.idm_head.weight.grad.abs().max() > 1e3  # far more than the pictures alone pull
    hidden = replace(batch, labeled=torch.zeros(8, dtype=torch.bool))
    assert model.loss(hidden)[1]["action"].item() == 0
    assert SMALL.build(space).action_decoder is None


def test_what_no_model_can_be_built_from() -> None:
    for wrong in (
        {"observations": "sound"},
        {"observations": "state", "state_size": 0},
        {"state_size": 2},
        {"steps": 0},
        {"fdm_context": 2},
        {"backbone": "impala", "size": 40},
    ):
        with pytest.raises(UserError, match=r"lam\."):
            replace(SMALL, **wrong)


@pytest.fixture
def moving(tmp_path: Path) -> Path:
    """A dataset whose pictures are black; the state moves left, right, up or down by the action."""
    rng = np.random.default_rng(0)
    actions = rng.integers(4, size=(8, 20))
    moves = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)], np.float32)[actions]
    states = np.cumsum(moves, 1) - moves
    frames = np.zeros((8, 20, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "moving.npz", observations=frames, action=actions, states=states, fps=10)
    return tmp_path / "moving.npz"


def test_states_alone_are_learned_from_through_the_command_line(moving: Path, tmp_path: Path) -> None:
    ended = cli(
        *("train-lam", "experiment=clam_debug", f"data.path={moving}", f"out={tmp_path / 'lam'}"),
        *("data.resolution=32", "lam.size=32", "lam.observations=state", "lam.state_size=2", "lam.steps=2"),
        *("lam.hidden=64", "lam.bottleneck.dim=4", "training.steps=200", "training.batch_size=32"),
        *("training.precision=32-true", "training.lr=0.003", "held_out=0.5", "training.eval_every=0"),
    )
    assert ended.returncode == 0, ended.stderr
    assert load_lam(tmp_path / "lam").state_size == 2
    probes = json.loads((tmp_path / "lam" / "lam.json").read_text())["probes"]
    assert probes["latent_linear"]["score"] > 0.9
    assert probes["shuffled_future"]["score"] < 0.5
    labeled = cli("label", "--lam", tmp_path / "lam", "--data", moving, "--out", tmp_path / "labels")
    assert labeled.returncode == 0, labeled.stderr
    assert "labeled 152 of 160 frames" in labeled.stderr
