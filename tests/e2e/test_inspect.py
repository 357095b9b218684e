"""`latentact inspect` calls bad latent action models and misaligned data by name, and passes a good one."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TINY_LAM, cli, write_blocks
from latentact.data.cache import DataConfig, open_store
from latentact.evaluation.lam.inspect import inspect_lam
from latentact.types import LatentActions, LatentActionSpec

SPEC = LatentActionSpec(
    **{"model": "fake", "tokens": 1, "token_dim": 2, "codebook_size": None, "frame_gap": 1},
    **{"frame_gap_s": 0.1, "fps": 10.0, "resolution": 32, "camera": ""},
)
RIGHT = ("healthy", [])


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr("latentact.evaluation.lam.probes.MLP_STEPS", 60)
    monkeypatch.setattr("latentact.evaluation.lam.diagnostics.DRAWS", 1)
    monkeypatch.setitem(sys.modules, "umap", None)


class Healthy(nn.Module):
    """Its latent is how far the block moves, in halves of a step; its prediction moves the block as far."""

    spec, context, generative, state_size, uses_images = SPEC, 0, True, 0, True

    def encode(self, frames, valid=None, last=False, states=None):
        place = self.place(frames)
        z = self.latents((place[:, 1:] - place[:, :-1]) / 4, frames)[:, -1:] if last else None
        z = self.latents((place[:, 1:] - place[:, :-1]) / 4, frames) if z is None else z
        return LatentActions(
            vectors=z[:, :, None],
            continuous=z[:, :, None],
            codes=self.codes(z),
            valid=torch.ones(z.shape[:2], dtype=torch.bool),
        )

    def place(self, frames):
        """Row and column of the block's middle `[b, t, 2]`."""
        block = (frames[:, :, 0] > 140).float()
        size, grid = block.sum((2, 3)).clamp(min=1), torch.arange(frames.shape[-1], dtype=torch.float32)
        return torch.stack([block.sum(3) @ grid, block.sum(2) @ grid], -1) / size[..., None]

    def latents(self, moved, frames):
        return moved

    def codes(self, z):
        return None

    def predict(self, frames, vectors):
        steps = (vectors[:, 0] * 4).round().long().tolist()
        return torch.stack(
            [frame.roll(tuple(step), (1, 2)) for frame, step in zip(frames[:, -1], steps, strict=True)]
        )


class Collapsed(Healthy):
    def latents(self, moved, frames):
        return torch.ones_like(moved)


class CollapsedCodes(Healthy):
    spec = replace(SPEC, codebook_size=64)

    def codes(self, z):
        return torch.full((*z.shape[:2], 1), 7)


class Ignoring(Healthy):
    def predict(self, frames, vectors):
        return frames[:, -1]


class Presence(Healthy):
    """Looks at the present alone."""

    def latents(self, moved, frames):
        return self.place(frames)[:, :-1] / 4


class WrongPairs(Healthy):
    """Sees the change of another clip of the batch: a model of pairs that do not belong together."""

    def latents(self, moved, frames):
        return moved[torch.randperm(len(moved), generator=torch.Generator().manual_seed(0))]


class NoForward(Healthy):
    """Tells the action, has codes and predicts nothing, as supervised inverse dynamics does."""

    spec, generative = replace(SPEC, codebook_size=9), False

    def codes(self, z):
        step = z.round().long() + 1
        return (step[..., :1] * 3 + step[..., 1:]).clamp(0, 8)


def shifted(path, out, by):
    """Move the actions of a dataset of 12-step episodes by rows, within each episode."""
    data = dict(np.load(path))
    data["action"] = np.roll(data["action"].reshape(-1, 12), by, axis=1).reshape(-1)
    np.savez(out, **data)
    return out


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_blocks(tmp_path_factory.mktemp("inspect") / "blocks.npz", episodes=20)


def inspected(model, path):
    store = open_store(DataConfig(path=str(path), resolution=32))
    numbers = inspect_lam(model, store, episodes=range(store.num_episodes), frame_gap=1).numbers
    json.dumps(numbers, allow_nan=False)
    return numbers


def test_a_healthy_model_passes(path):
    numbers = inspected(Healthy(), path)
    verdict = numbers["verdict"]
    assert (verdict["go"], verdict["name"], verdict["findings"]) == (True, "healthy", [])
    assert verdict["headline"].startswith("Go: latents predict 0.9")
    assert numbers["algebra"] == pytest.approx({"additivity": 0, "reversal": 0, "identity": 0}, abs=1e-6)
    assert numbers["reconstruction"]["recon_mse"] == 0
    assert numbers["controllability"]["delta_psnr"][0] > 20
    assert numbers["leakage"]["centered"] < 0.3
    assert max(numbers["lags"], key=lambda row: row["score"])["lag"] == 0
    efficiency = numbers["label_efficiency"]
    assert [row["k"] for row in efficiency] == [1, 2, 4, 8, 10]
    assert efficiency[-1]["latent"]["score"] > 0.85 > 0.5 > efficiency[-1]["floor"]["score"]
    assert numbers["saliency"]["share_inside"] > 2 * numbers["saliency"]["area"]
    assert [row["frames"] for row in numbers["gaps"]] == [1, 2, 4]


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        (Collapsed, "collapsed", "the same for every transition"),
        (CollapsedCodes, "collapsed", "the model uses 1.0 of 64 codes"),
        (Ignoring, "ignored", "ignores its latents"),
        (Presence, "shuffled_future", "do not depend on the future"),
        (WrongPairs, "shuffled_future", "latents do not identify the actual future"),
    ],
)
def test_bad_models_are_called_by_name(path, model, name, said):
    verdict = inspected(model(), path)["verdict"]
    assert (verdict["go"], verdict["name"]) == (False, name)
    assert verdict["headline"].startswith("No-go: ")
    assert said in verdict["headline"]
    assert verdict["recommendation"]


@pytest.mark.parametrize(("by", "said"), [(1, "1 row too late"), (-1, "1 row too early")])
def test_an_off_by_one_dataset_is_called_by_name(path, tmp_path, by, said):
    numbers = inspected(Healthy(), shifted(path, tmp_path / "shifted.npz", by))
    assert numbers["misaligned"] == by
    verdict = numbers["verdict"]
    assert (verdict["go"], verdict["name"]) == (False, "off_by_one")
    assert "off by one" in verdict["headline"]
    assert said in verdict["headline"]


def test_a_model_without_forward_dynamics_passes_and_the_rest_is_said(path):
    numbers = inspected(NoForward(), path)
    assert numbers["verdict"]["name"] == "healthy"
    assert numbers["reconstruction"] is numbers["controllability"] is numbers["prediction_change"] is None
    assert numbers["codebook"]["used"] == 5
    assert "The model predicts no frames" in " ".join(numbers["missing"])


@pytest.mark.parametrize(
    ("model", "name"), [(Healthy, "healthy"), (Collapsed, "collapsed"), (Ignoring, "ignored")]
)
def test_without_actions_the_label_free_part_judges(path, tmp_path, model, name):
    data = dict(np.load(path))
    del data["action"]
    np.savez(tmp_path / "video.npz", **data)
    numbers = inspected(model(), tmp_path / "video.npz")
    assert numbers["verdict"]["name"] == name
    assert numbers["probes"] == {}
    assert numbers["lags"] == numbers["label_efficiency"] == []
    assert "The data has no actions" in " ".join(numbers["missing"])
    if name == "healthy":
        assert numbers["verdict"]["headline"].startswith("Go as far as metrics without actions show")


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "lam"
    done = cli("train-lam", f"data.path={path}", f"out={out}", "held_out=0.4", *TINY_LAM)
    assert done.returncode == 0, done.stderr
    return out


def test_the_command_judges_what_training_held_out_and_writes_a_page(trained, path, tmp_path):
    done = cli("inspect", trained, "--data", path, "--out", tmp_path / "card")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "card/inspect.json").read_text())
    verdict = numbers["verdict"]
    assert done.stdout.splitlines() == [
        verdict["headline"],
        *(f"Caution: {each['message']}" for each in verdict["findings"] if each["level"] == "caution"),
        verdict["recommendation"],
        str(tmp_path / "card/inspect.html"),
    ]
    assert numbers["episodes"] == 8
    assert verdict["name"] != "off_by_one"
    page = (tmp_path / "card/inspect.html").read_text()
    assert "https://" not in page.partition("<script>")[0]
    assert all(f'id="{anchor}"' in page for anchor in ("probes", "labels", "time", "use", "content", "map"))
    again = cli("inspect", trained, "--data", path, "--out", tmp_path / "again")
    assert again.returncode == 0
    assert json.loads((tmp_path / "again/inspect.json").read_text()) == numbers


def test_what_was_held_out_is_known_by_the_frames_and_other_data_is_judged_whole(trained, path, tmp_path):
    other = write_blocks(tmp_path / "other.npz", episodes=6, seed=3)
    for data, episodes in ((shutil.copy(path, tmp_path / "copy.npz"), 8), (other, 6)):
        assert cli("inspect", trained, "--data", data, "--out", tmp_path / "card").returncode == 0
        numbers = json.loads((tmp_path / "card/inspect.json").read_text())
        assert numbers["episodes"] == episodes
        assert any("all episodes are used" in said for said in numbers["missing"]) == (data == other)


def test_one_episode_is_said_to_be_one(trained, tmp_path):
    data = write_blocks(tmp_path / "one.npz", episodes=1, steps=30)
    assert cli("inspect", trained, "--data", data, "--out", tmp_path / "card").returncode == 0
    numbers = json.loads((tmp_path / "card/inspect.json").read_text())
    assert any(said.startswith("There is only one evaluation episode") for said in numbers["missing"])
    page = (tmp_path / "card/inspect.html").read_text()
    assert not any(f'id="{anchor}"' in page for anchor in ("labels", "transfer"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [(("--held-out", "1.5"), "between 0 and 1"), (("--frame-gap-s", "9"), "Use a smaller gap")],
)
def test_bad_input_is_one_sentence(trained, path, tmp_path, flags, said):
    done = cli("inspect", trained, "--data", path, "--out", tmp_path / "card", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1]
    assert not (tmp_path / "card").exists()
