"""Conformal intervals and sets: hand-computed quantiles, and coverage on data of known distribution."""

import numpy as np
import pytest

from latentact.errors import UserError
from latentact.evaluation.policy.conformal import (
    ClassCalibration,
    IntervalCalibration,
    conformal_quantile,
    temperature,
)


def test_the_quantile_is_a_score_by_rank():
    scores = np.array([5.0, 1, 4, 2, 3, 9, 8, 7, 6])
    assert conformal_quantile(scores, 0.9) == 9  # ceil(10 x 0.9) = 9th of 9
    assert conformal_quantile(scores, 0.8) == 8
    assert conformal_quantile(scores, 0.5) == 5
    assert conformal_quantile(np.arange(19.0), 0.9) == 17  # ceil(20 x 0.9) = 18th
    with pytest.raises(UserError, match="8 labeled steps are too few for intervals of 90%"):
        conformal_quantile(scores[:8], 0.9)


def test_sets_hold_what_is_probable_enough():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.05, 0.05, 0.9]])
    calibration = ClassCalibration(power=1.0, threshold=0.66)
    assert calibration.sets(probabilities).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]
    sharper = ClassCalibration(power=2.0, threshold=0.66).probabilities(probabilities)
    assert sharper[0] == pytest.approx(np.array([49, 4, 1]) / 54)


def test_temperature_undoes_overconfidence():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 4)) * 1.5
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(4, p=row) for row in true])
    confident = true**3 / (true**3).sum(1, keepdims=True)
    assert temperature(confident, labels) == pytest.approx(1 / 3, abs=0.04)


def test_class_sets_cover_nine_tenths():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4000, 5)) * 2
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(5, p=row) for row in true])
    guessed = true**2 / (true**2).sum(1, keepdims=True)
    calibration = ClassCalibration.fit(guessed[:2000], labels[:2000], 0.9)
    covered = calibration.sets(guessed[2000:])[np.arange(2000), labels[2000:]]
    assert 0.88 <= covered.mean() <= 0.92


def test_intervals_cover_nine_tenths_and_are_wide_where_errors_are():
    rng = np.random.default_rng(2)
    inputs = rng.uniform(0, 1, size=(4000, 1)).astype(np.float32)
    noise = np.where(inputs < 0.5, 0.1, 1.0) * np.array([1.0, 10.0])
    errors = np.abs(rng.normal(size=(4000, 2)) * noise)
    calibration = IntervalCalibration.fit(
        inputs[:2000], errors[:2000], np.arange(2000) // 100, 0.9, np.ones(errors.shape[1])
    )
    half = calibration.half_widths(inputs[2000:])
    covered = errors[2000:] <= half
    assert (abs(covered.mean(0) - 0.9) < 0.03).all()
    quiet, loud = (half[inputs[2000:, 0] < 0.45]).mean(0), (half[inputs[2000:, 0] > 0.55]).mean(0)
    assert (loud > 4 * quiet).all()
    assert half[:, 1].mean() == pytest.approx(10 * half[:, 0].mean(), rel=0.2)


def test_the_scale_of_a_step_is_that_of_other_episodes():
    inputs = np.zeros((20, 1), np.float32)
    residuals = np.where(np.arange(20) < 10, 1.0, 3.0)[:, None]
    calibration = IntervalCalibration.fit(
        inputs, residuals, np.arange(20) // 10, 0.9, np.ones(residuals.shape[1])
    )
    # The second episode's residuals 3 by the first's scale 1 + 0.1 x mean: rank ceil(21 x 0.9) = 19.
    assert calibration.factors == pytest.approx([3 / 1.1])
