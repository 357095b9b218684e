import numpy as np
import pytest
import torch

from latentact.evaluation.lam.probes import ProbeData, linear_probe, mlp_probe, principal_components


def halves(features, targets, episodes=20):
    episode = np.arange(len(features)) * episodes // len(features)
    parts = (episode < episodes // 2, episode >= episodes // 2)
    return [ProbeData(features=features[p], targets=targets[p], episode=episode[p]) for p in parts]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_linear_targets_are_read_exactly(rng):
    x = rng.normal(size=(800, 5)) * [1, 10, 100, 0.1, 1] + 3
    y = x @ rng.normal(size=(5, 2)) + 7
    score = linear_probe(*halves(x, y))
    assert score.metric == "r2"
    assert score.score == pytest.approx(1, abs=1e-3)
    assert score.ci95[0] > 0.999


def test_r2_by_hand():
    # The fitting set has no relation, so the probe predicts its mean 0; the scored targets 1, 3 have mean 2:
    # error 1 + 9 = 10, spread 1 + 1 = 2, R2 = 1 - 10 / 2 = -4. Targets are standardized by deviation 1.
    fit = ProbeData(
        features=np.array([[1.0], [1], [-1], [-1]]),
        targets=np.array([[1.0], [-1], [1], [-1]]),
        episode=np.array([0, 0, 0, 0]),
    )
    score = ProbeData(
        features=np.array([[1.0], [-1]]), targets=np.array([[1.0], [3]]), episode=np.array([1, 1])
    )
    assert linear_probe(fit, score).score == pytest.approx(-4)


def test_unrelated_features_are_no_better_than_the_mean(rng):
    fit, score = halves(rng.normal(size=(800, 5)), rng.normal(size=(800, 2)))
    assert abs(linear_probe(fit, score).score) < 0.05


def test_classes_that_a_line_separates(rng):
    y = rng.integers(0, 3, 600)
    x = np.array([[4, 0], [0, 4], [-4, -4]])[y] + rng.normal(size=(600, 2)) * 0.3
    for probe in (linear_probe, mlp_probe):
        score = probe(*halves(x, y))
        assert score.metric == "accuracy"
        assert score.score == 1
        assert score.ci95 == (1, 1)


def test_unrelated_classes_are_at_chance(rng):
    fit, score = halves(rng.normal(size=(2000, 3)), rng.integers(0, 4, 2000))
    result = linear_probe(fit, score)
    assert result.score == pytest.approx(0.25, abs=0.05)
    assert result.ci95[0] < 0.25 < result.ci95[1]


def test_only_the_mlp_reads_exclusive_or(rng):
    x = rng.choice([-1.0, 1.0], size=(800, 2)) + rng.normal(size=(800, 2)) * 0.1
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    assert linear_probe(*halves(x, y)).score < 0.65
    assert mlp_probe(*halves(x, y)).score > 0.98


def test_the_mlp_reads_a_curve(rng):
    x = rng.uniform(-2, 2, size=(800, 1))
    assert linear_probe(*halves(x, x**2)).score < 0.1
    assert mlp_probe(*halves(x, x**2)).score > 0.98


def test_a_class_that_was_never_fitted_counts_as_wrong():
    x = np.array([[0.0], [1], [0], [1], [2], [2]])
    y = np.array([0, 1, 0, 1, 7, 7])
    fit = ProbeData(features=x[:4], targets=y[:4], episode=np.zeros(4, int))
    score = ProbeData(features=x[2:], targets=y[2:], episode=np.arange(4))
    assert linear_probe(fit, score).score == 0.5


def test_constant_features_and_targets_are_no_error():
    for y, wanted in ((np.ones((40, 2)), 0.0), (np.ones(40, int), 1.0)):
        assert linear_probe(*halves(np.ones((40, 3)), y)).score == wanted
        assert mlp_probe(*halves(np.ones((40, 3)), y)).score == wanted


def test_the_interval_is_over_episodes_not_transitions(rng):
    # Half of the scored episodes are always right, half always wrong: 2000 transitions, only 10 episodes.
    x = rng.choice([-1.0, 1.0], size=(4000, 1))
    y = (x[:, 0] > 0).astype(np.int64)
    fit, score = halves(x, y)
    wrong = score.episode % 2 == 0
    flipped = ProbeData(
        features=np.where(wrong[:, None], -x[2000:], x[2000:]), targets=y[2000:], episode=score.episode
    )
    result = linear_probe(fit, flipped)
    assert result.score == 0.5
    assert result.ci95[0] < 0.25
    assert result.ci95[1] > 0.75


def test_the_same_seed_gives_the_same_score_and_leaves_torch_alone(rng):
    data = halves(rng.normal(size=(400, 3)), rng.normal(size=(400, 1)))
    torch.manual_seed(5)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = mlp_probe(*data, seed=1)
    assert first == mlp_probe(*data, seed=1)
    assert first != mlp_probe(*data, seed=2)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_principal_components_by_hand():
    x = np.array([[3.0, 1], [-3, 1], [0, 2], [0, 0]])
    flat = principal_components(x, x, dims=1)
    assert np.abs(flat[:, 0]) == pytest.approx([3, 3, 0, 0])
    assert principal_components(x, x[:1], dims=9).shape == (1, 2)
