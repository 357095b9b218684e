import numpy as np
import pytest

from latentact.evaluation.lam.codebook import codebook_health


def test_all_codes_equally_often():
    health = codebook_health(np.arange(8).repeat(3)[:, None], 8)
    assert (health.size, health.used, health.dead) == (8, 8, 0)
    assert health.perplexity == pytest.approx(8)


def test_by_hand():
    # shares 1/2, 1/4, 1/4: entropy 1.5 bits, perplexity 2 ** 1.5
    health = codebook_health(np.array([[0], [0], [3], [5]]), 6)
    assert (health.used, health.dead) == (3, 3)
    assert health.perplexity == pytest.approx(2**1.5)


def test_tokens_stuck_at_different_codes_have_collapsed():
    health = codebook_health(np.array([[1, 2, 3]] * 10), 4)
    assert (health.used, health.dead) == (3, 1)
    assert health.perplexity == pytest.approx(1)


@pytest.mark.parametrize("codes", [np.zeros((0, 1), int), np.array([[4]]), np.array([[-1]])])
def test_impossible_codes(codes):
    with pytest.raises(ValueError, match=r"0\.\.3"):
        codebook_health(codes, 4)
