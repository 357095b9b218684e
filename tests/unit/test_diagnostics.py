"""Hand-computed numbers of an inspection, and what verdicts say about numbers."""

from __future__ import annotations

import numpy as np
import pytest

from latentact.evaluation.lam import diagnostics
from latentact.evaluation.lam.diagnostics import (
    algebra,
    delta_psnr,
    effective_dims,
    future_dependence,
    label_efficiency,
    lag_curve,
    mean_cosine,
    misaligned,
    past_future_cosine,
    psnr,
    relative_error,
    share_inside,
    spread,
    without_state,
)
from latentact.evaluation.lam.probes import ProbeData, ProbeScore, linear_probe
from latentact.evaluation.lam.verdict import interpret

A = np.array([[3.0, 4.0], [0.0, 1.0]])


def test_spread():
    # Mean (1, 0): deviations 1 and 1; sizes 0 and 2: sqrt(1) / sqrt(2).
    assert spread(np.array([[0.0, 0.0], [2.0, 0.0]])) == pytest.approx(np.sqrt(0.5))
    assert spread(np.full((5, 3), 7.0)) == 0
    assert spread(np.zeros((5, 3))) == 0


def test_effective_dims():
    # Variances 9 and 1: (9 + 1)^2 / (81 + 1).
    latents = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert effective_dims(latents) == pytest.approx(100 / 82)
    assert effective_dims(np.eye(4)[:, :3]) == pytest.approx(2.25**2 / 2.0625)  # variances 1, 1, 1/4
    assert effective_dims(np.ones((4, 3))) == 0


def test_relative_error():
    # Lengths of the error 5 and 1, of the reference 2 and 4.
    assert relative_error(A, np.array([[2.0, 0], [0, 4]])) == pytest.approx(3 / 3)
    assert relative_error(A, np.zeros((2, 2))) == 0


def test_algebra_of_displacements_and_of_places():
    a, b, c = np.random.default_rng(0).normal(size=(3, 50, 2))
    exact = algebra(b - a, c - b, c - a, a - b, a - a)
    assert exact == pytest.approx({"additivity": 0, "reversal": 0, "identity": 0}, abs=1e-12)
    places = algebra(b, c, c, a, a)  # latents that are the target's place
    assert places["additivity"] == pytest.approx(relative_error(b, c))
    assert places["identity"] == pytest.approx(relative_error(a, b))
    assert places["reversal"] > 1


def test_cosines():
    # 3*0+4*2 = 8 over 5*2; 0*1+1*0 = 0.
    assert mean_cosine(A, np.array([[0.0, 2.0], [1.0, 0.0]])) == pytest.approx(0.4)
    assert mean_cosine(A, np.zeros((2, 2))) == 0
    moved = np.random.default_rng(0).normal(size=(400, 2))
    there = past_future_cosine(moved + 9, moved + 9)
    assert there == pytest.approx({"s_pcfc": 1, "centered": 1})
    back = past_future_cosine(9 + moved, 9 - moved)
    assert back["s_pcfc"] > 0.9  # what all latents share hides that they are opposite
    assert back["centered"] == pytest.approx(-1, abs=0.01)


def test_future_dependence():
    own, others = np.zeros((4, 2)), np.full((4, 2), 2.0)
    assert future_dependence(own, own, others) == 0
    assert future_dependence(own, own + 1.0, others) == pytest.approx(0.5)


def test_psnr_and_its_difference():
    assert psnr(np.array([1.0, 0.01, 1e-9])) == pytest.approx([0, 20, 60])
    own, other = np.array([[0.01, 0.1], [0.001, 0.1]]), np.array([[0.1, 0.1], [0.1, 1.0]])
    assert delta_psnr(own, other) == pytest.approx([15, 5])


def test_share_inside():
    response = np.array([[[3.0, 1.0], [0.0, 0.0]]])
    moving = np.array([[[True, False], [False, False]]])
    assert share_inside(response, moving) == (0.75, 0.25)
    assert share_inside(np.zeros_like(response), moving) == (0, 0.25)


def test_without_state_leaves_the_move():
    rng = np.random.default_rng(0)
    place, move = rng.uniform(0, 500, (300, 2)), rng.normal(size=(300, 2))
    actions = place + move
    fit = np.arange(300) < 200
    left = without_state(actions, place, fit)
    assert np.corrcoef(left[:, 0], move[:, 0])[0, 1] > 0.99
    actions[0] = np.nan
    left = without_state(actions, place, fit)
    assert np.isnan(left[0]).all()
    assert np.isfinite(left[1:]).all()


def lagged(by: int, *, discrete: bool = True) -> dict[int, ProbeScore]:
    """The lag curve of latents that tell the action `by` rows later."""
    rng = np.random.default_rng(0)
    taken = rng.integers(0, 3, 404) if discrete else rng.normal(size=(404, 2))
    rows = np.arange(2, 402)
    told = taken[rows + by]
    latents = np.eye(3)[told] if discrete else told
    episode = rows // 20
    return lag_curve(
        latents, {lag: taken[rows + lag] for lag in range(-2, 3)}, rows < 200, rows >= 200, episode, 0
    )


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("by", [-2, -1, 0, 1, 2])
def test_the_lag_curve_peaks_where_the_action_is(by, discrete):
    curve = lagged(by, discrete=discrete)
    assert max(curve, key=lambda lag: curve[lag].score) == by
    assert curve[by].score > 0.99
    assert misaligned(curve, 1) == (by or None)


def test_any_row_of_a_long_transition_is_aligned():
    assert misaligned(lagged(1), 2) is None
    assert misaligned(lagged(2), 2) == 2


def test_a_lead_that_may_be_luck_is_not_called():
    probe = {"metric": "accuracy", "ci95": (0.3, 0.5)}
    curve = {0: ProbeScore(score=0.4, **probe), 1: ProbeScore(score=0.48, **probe)}
    assert misaligned(curve, 1) is None


@pytest.mark.parametrize(("level", "found"), [(0.1, None), (0.3, -2)])
def test_a_flat_curve_of_numbers_says_nothing(level, found):
    def probe(score):
        return ProbeScore(score=score, metric="r2", ci95=(score - 0.01, score + 0.01))

    assert misaligned({-2: probe(level), 0: probe(level - 0.08)}, 1) == found


def test_label_efficiency_by_hand(monkeypatch):
    monkeypatch.setattr(diagnostics, "DRAWS", 2)
    rng = np.random.default_rng(0)
    action = rng.normal(size=(120, 1))
    parts = [slice(0, 60), slice(60, 120)]
    episode = np.repeat(np.arange(12), 10)

    def data(features):
        return [ProbeData(features=features[p], targets=action[p], episode=episode[p]) for p in parts]

    good, bad = data(action * 3), data(rng.normal(size=(120, 1)))
    curve = label_efficiency(*good, *bad, seed=0)
    assert [row["k"] for row in curve] == [1, 2, 4, 6]
    assert all(row["latent"]["low"] <= row["latent"]["score"] <= row["latent"]["high"] for row in curve)
    assert curve[0]["latent"]["score"] > 0.9 > 0.2 > curve[0]["floor"]["score"]
    assert curve[-1]["latent"]["score"] == pytest.approx(linear_probe(*good).score)
    assert curve[-1]["latent"]["low"] == curve[-1]["latent"]["high"]


def test_ridge_is_the_same_by_either_matrix():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(40, 60))
    targets = wide @ rng.normal(size=(60, 2))
    x, y = (wide - wide.mean(0)) / wide.std(0), (targets - targets.mean(0)) / targets.std(0)
    plain = x @ np.linalg.solve(x.T @ x + np.eye(60), x.T @ y)
    from latentact.evaluation.lam.probes import _ridge

    assert _ridge(x, y, x) == pytest.approx(plain, abs=1e-9)


def test_nmse_is_the_rest_of_r2():
    score = ProbeScore(score=0.7, metric="r2", ci95=(0.6, 0.8)).to_json()
    assert score["nmse"] == pytest.approx(0.3)
    assert score["nmse_ci95"] == pytest.approx([0.2, 0.4])
    assert "nmse" not in ProbeScore(score=0.7, metric="accuracy", ci95=(0.6, 0.8)).to_json()


def numbers(**changes):
    """Those of a healthy model with codes."""

    def probe(score):
        return {"score": score, "metric": "r2", "ci95": [score - 0.05, score + 0.05]}

    return {
        "transitions": 500,
        "uses_images": True,
        "latents": {"spread": 1.0, "future_dependence": 0.9},
        "codebook": {"size": 8, "perplexity": 6.0},
        "reconstruction": {"recon_mse": 1e-4, "copy_mse": 1e-3, "shuffled_mse": 1e-3},
        "prediction_change": 0.8,
        "leakage": {"centered": 0.1, "across_cuts": 0.8},
        "misaligned": None,
        "probes": {
            **{"latent_linear": probe(0.8), "latent_mlp": probe(0.8)},
            **{"state_only": probe(0.3), "shuffled_future": probe(0.3)},
        },
        **changes,
    }


def changed_probes(**scores):
    probes = numbers()["probes"]
    more = {name: {"score": s, "metric": "r2", "ci95": [s - 0.05, s + 0.05]} for name, s in scores.items()}
    return {"probes": probes | more}


SAME = {"recon_mse": 1e-3, "copy_mse": 1e-2, "shuffled_mse": 1e-3}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "healthy"),
        ({"codebook": {"size": 8, "perplexity": 1.1}}, "collapsed"),
        ({"latents": {"spread": 1e-5, "future_dependence": 0.9}}, "collapsed"),
        ({"latents": {"spread": 1.0, "future_dependence": 0.01}}, "shuffled_future"),
        ({"prediction_change": 0.001}, "ignored"),
        ({"misaligned": -1}, "off_by_one"),
        ({"leakage": {"s_pcfc": 0.94, "centered": 0.92, "across_cuts": 0.1}}, "shuffled_future"),
        (changed_probes(latent_linear=0.3, latent_mlp=0.3), "no_action"),
        (changed_probes(latent_linear=0.3, latent_mlp=0.3, nuisance_linear=0.7), "nuisance"),
        (changed_probes(latent_linear=0.3, latent_mlp=0.3, latent_and_present_mlp=0.5), "healthy"),
        ({"reconstruction": SAME, **changed_probes(state_only=0.9)}, "no_action"),
        (
            {"reconstruction": SAME, **changed_probes(latent_linear=0.3, latent_mlp=0.3)},
            "shuffled_future",
        ),
        ({"transitions": 7, "codebook": {"size": 8, "perplexity": 1.0}}, "too_few"),
        ({"probes": {}, "codebook": None}, "healthy"),
        ({"probes": {}, "reconstruction": SAME}, "shuffled_future"),
        ({"reconstruction": None, "prediction_change": None}, "healthy"),
    ],
)
def test_verdicts(changes, name):
    verdict = interpret(numbers(**changes))
    assert verdict.name == name
    assert verdict.go == (name == "healthy")
    assert verdict.headline.startswith("Go" if verdict.go else "No-go: ")
    assert verdict.recommendation


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"reconstruction": {"recon_mse": 1e-3, "copy_mse": 1e-3, "shuffled_mse": 1e-2}}, "copies"),
        ({"codebook": {"size": 64, "perplexity": 4.0}}, "few_codes"),
        ({"leakage": {"centered": 0.95, "across_cuts": None}}, "leaks"),
        ({"leakage": {"centered": 0.6, "across_cuts": 0.2}}, "leaks"),
        (changed_probes(nuisance_linear=0.95), "nuisance"),
        ({"reconstruction": SAME}, "unused"),
    ],
)
def test_cautions_do_not_forbid(changes, name):
    verdict = interpret(numbers(**changes))
    assert verdict.go
    assert [(finding.name, finding.level) for finding in verdict.findings] == [(name, "caution")]


def test_a_leak_is_told_as_what_it_is():
    (far,) = interpret(numbers(leakage={"centered": 0.95, "across_cuts": 1.01})).findings
    (near,) = interpret(numbers(leakage={"centered": 0.95, "across_cuts": 0.4})).findings
    (state,) = interpret(numbers(leakage={"centered": 0.95, "across_cuts": None}, uses_images=False)).findings
    assert "across a cut" not in far.message, "no evidence of a picture"
    assert "across a cut the error is 40%" in near.message
    assert "frame" in near.recommendation
    assert "frame" not in state.message + state.recommendation
