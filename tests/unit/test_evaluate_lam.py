from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from latentact.data.store import FrameStore
from latentact.errors import UserError
from latentact.evaluation.lam.metrics import evaluate_lam
from latentact.types import ActionSpace, LatentActions, LatentActionSpec

SHIFTS = ((0, 4), (0, -4), (4, 0), (-4, 0))
SPEC = LatentActionSpec(
    model="fake",
    tokens=1,
    token_dim=4,
    codebook_size=4,
    frame_gap=1,
    frame_gap_s=0.1,
    fps=10.0,
    resolution=16,
    camera="",
)


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch):
    monkeypatch.setattr("latentact.evaluation.lam.probes.MLP_STEPS", 50)


class RollingStore(FrameStore):
    """Noise that rolls over the edges by the action's shift, of which one picture alone tells nothing."""

    def __init__(self, *, episodes: int = 12, length: int = 15, gap: int = 1, kind: str = "discrete") -> None:
        rng = np.random.default_rng(0)
        taken = rng.integers(0, 4, (episodes, length))
        frames = np.zeros((episodes, length, 16, 16, 3), np.uint8)
        for e in range(episodes):
            frames[e, 0] = rng.integers(0, 256, (16, 16, 3))
            for t in range(1, length):
                frames[e, t] = np.roll(frames[e, t - 1], SHIFTS[taken[e, t - 1]], (0, 1))
        self.path = None
        self.frames = frames.reshape(-1, 16, 16, 3)
        self.lengths = np.full(episodes, length)
        self.starts = np.arange(episodes) * length
        self.episode = np.repeat(np.arange(episodes), length)
        self.timestamps = self.frame_times = np.tile(np.arange(length) / 10, episodes)
        self._resampled_from, self._drop_nonfinite = 0.0, False
        self.fps = 10.0
        self.action_names = ("right", "left", "down", "up") if kind == "discrete" else ()
        self.action_space = None
        self.state = None
        if kind == "discrete":
            self.action_space = ActionSpace(kind="discrete", size=4)
            self._taken = taken.reshape(-1)
        elif kind == "continuous":
            self.action_space = ActionSpace(kind="continuous", size=2)
            moves = np.array(SHIFTS, np.float32)[taken]
            self.state = np.concatenate([np.zeros_like(moves[:, :1]), moves.cumsum(1)[:, :-1]], 1).reshape(
                -1, 2
            )
            self._taken = moves.reshape(-1, 2)

    def actions(self, episodes):
        hidden = ~np.isin(self.episode, list(episodes))
        hidden = np.broadcast_to(hidden.reshape(-1, *[1] * (self._taken.ndim - 1)), self._taken.shape)
        return np.ma.MaskedArray(self._taken, mask=hidden)


class Right(nn.Module):
    """A LAM that knows: its latent is the shift, its prediction applies it."""

    spec = SPEC
    context = 1

    generative = True
    state_size = 0

    def encode(self, frames, valid=None, last=False, states=None):
        assert not self.training
        now, after = frames[:, -2], frames[:, -1]
        found = torch.stack([(now.roll(s, (-2, -1)) == after).all((1, 2, 3)) for s in SHIFTS], -1).float()
        return self.latents(found)

    def latents(self, found):
        vectors = found[:, None, None]
        return LatentActions(
            vectors=vectors,
            continuous=vectors,
            codes=vectors.argmax(-1),
            valid=torch.ones(vectors.shape[:2], dtype=torch.bool),
        )

    def predict(self, frames, vectors):
        shifts = vectors[:, 0].argmax(-1).tolist()
        return torch.stack(
            [frame.roll(SHIFTS[s], (-2, -1)) for frame, s in zip(frames[:, -1], shifts, strict=True)]
        )


class Ignoring(Right):
    def predict(self, frames, vectors):
        return frames[:, -1]


class Collapsed(Right):
    spec = replace(SPEC, codebook_size=64)

    def latents(self, found):
        return super().latents(torch.tensor([1.0, 0, 0, 0]).expand_as(found))


def test_a_lam_that_is_right():
    model = Right().train()
    result = evaluate_lam(model, RollingStore(), episodes=range(2, 12), frame_gap=1)
    numbers, arrays = result.numbers, result.arrays
    assert model.training
    assert numbers["recon_mse"] == 0
    assert numbers["copy_mse"] > 0.1
    assert numbers["shuffled_mse"] > 0.1
    assert numbers["probes"]["latent_linear"] == {"score": 1.0, "metric": "accuracy", "ci95": [1.0, 1.0]}
    assert numbers["probes"]["latent_mlp"]["score"] == 1
    assert numbers["probes"]["state_only"]["score"] < 0.5
    assert numbers["probes"]["shuffled_future"]["score"] < 0.6
    assert numbers["codebook"]["used"] == 4
    assert numbers["warnings"] == []
    assert arrays["vectors"].shape == (140, 4)
    assert set(arrays["episode"]) == set(range(2, 12))
    assert arrays["codes"].shape == (140, 1)
    assert (arrays["action"] == arrays["codes"][:, 0]).all()


def test_pictures_are_of_moving_transitions_in_different_episodes():
    arrays = evaluate_lam(Right(), RollingStore(), episodes=range(12), frame_gap=1).arrays
    assert arrays["now"].shape == arrays["next"].shape == arrays["predicted"].shape == (8, 16, 16, 3)
    assert (arrays["predicted"] == arrays["next"]).all()
    assert (arrays["now"] != arrays["next"]).any((1, 2, 3)).all()
    assert len(np.unique(arrays["now"].reshape(8, -1), axis=0)) == 8
    assert arrays["transfer_source"].shape == (4, 2, 16, 16, 3)
    assert arrays["transfer_grid"].shape == (4, 6, 16, 16, 3)
    assert not set(arrays["transfer_source_episode"]) & set(arrays["transfer_start_episode"])
    shifts = set()
    for source, row in zip(arrays["transfer_source"], arrays["transfer_grid"], strict=True):
        shift = next(s for s in SHIFTS if (np.roll(source[0], s, (0, 1)) == source[1]).all())
        shifts.add(shift)
        assert (np.roll(arrays["transfer_start"], shift, (1, 2)) == row).all()
    assert shifts == set(SHIFTS)  # the sources differ as far as they can


def test_the_result_does_not_depend_on_chance_beyond_the_seed():
    first, second = (
        evaluate_lam(Right(), RollingStore(), episodes=range(12), frame_gap=1, seed=3, max_transitions=90)
        for _ in range(2)
    )
    assert first.numbers == second.numbers
    assert first.numbers["transitions"] == 90
    assert all((first.arrays[name] == second.arrays[name]).all() for name in first.arrays)


def test_a_lam_that_ignores_latents_is_called_out():
    numbers = evaluate_lam(Ignoring(), RollingStore(), episodes=range(12), frame_gap=1).numbers
    assert numbers["recon_mse"] == numbers["copy_mse"] == numbers["shuffled_mse"]
    assert [w.split(":")[0].split("(")[0] for w in numbers["warnings"]] == [
        "Latents are not used",
        "Predictions are no better than copying the last frame ",
    ]


def test_a_collapsed_lam_is_called_out():
    numbers = evaluate_lam(Collapsed(), RollingStore(), episodes=range(12), frame_gap=1).numbers
    assert numbers["codebook"] == {"size": 64, "used": 1, "dead": 63, "perplexity": 1.0}
    said = " ".join(numbers["warnings"])
    assert "Codes collapsed" in said
    assert "Latents predict the action no better" in said


def test_continuous_actions_and_displacement():
    probes = evaluate_lam(Right(), RollingStore(kind="continuous"), episodes=range(12), frame_gap=1).numbers[
        "probes"
    ]
    assert probes["latent_linear"]["metric"] == "r2"
    assert probes["latent_linear"]["score"] > 0.98
    assert probes["state_change"]["score"] > 0.98
    assert probes["state_only"]["score"] < 0.2
    assert probes["state_change_state_only"]["score"] < 0.2


def test_without_actions_there_are_no_probes():
    result = evaluate_lam(Right(), RollingStore(kind="none"), episodes=range(12), frame_gap=1)
    assert result.numbers["probes"] == {}
    assert "action" not in result.arrays
    assert result.numbers["warnings"] == []


def test_a_single_episode_is_split_in_time_and_said_so():
    numbers = evaluate_lam(Right(), RollingStore(episodes=2, length=80), episodes=[1], frame_gap=1).numbers
    assert numbers["probes"]["latent_linear"]["score"] == 1
    assert numbers["warnings"] == [
        "There is only one held-out episode: probes are fitted on its beginning and scored on its end."
    ]


def test_a_model_that_diverged_is_a_user_error():
    class Diverged(Right):
        def latents(self, found):
            return super().latents(found * torch.nan)

    with pytest.raises(UserError, match="not finite"):
        evaluate_lam(Diverged(), RollingStore(), episodes=range(12), frame_gap=1)


def test_too_few_transitions_for_probes_are_said_so():
    numbers = evaluate_lam(Right(), RollingStore(episodes=2, length=5), episodes=[0, 1], frame_gap=1).numbers
    assert numbers["probes"] == {}
    assert "hold out more episodes" in numbers["warnings"][0]


def test_integer_grids_have_no_pictures():
    store = RollingStore()
    store.frames = store.frames[..., :2]
    result = evaluate_lam(Right(), store, episodes=range(12), frame_gap=1)
    assert "now" not in result.arrays
    assert result.numbers["probes"]["latent_linear"]["score"] == 1
    assert result.numbers["recon_mse"] == 0


def test_a_model_of_another_resolution_is_judged_at_its_own():
    size = 24

    class Resized(Right):
        def predict(self, frames, vectors):
            predicted = super().predict(frames, vectors).float()
            return nn.functional.interpolate(predicted, (size, size), mode="bilinear", antialias=True).byte()

    result = evaluate_lam(Resized(), RollingStore(), episodes=range(12), frame_gap=1)
    assert result.numbers["recon_mse"] < 1e-4
    assert result.arrays["transfer_source"].shape == (4, 2, size, size, 3)
