"""The measures and verdict of `check-guidance`, on paths made by hand."""

import numpy as np
import pytest

from latentact.errors import UserError
from latentact.evaluation.policy.guidance import EpisodeTrace, compare_traces, summarize
from latentact.stages.check_guidance import CheckGuidanceConfig


def path(agent, block=None, coverage=None):
    agent = np.asarray(agent, float)
    return EpisodeTrace(
        pixels=np.zeros((len(agent), 2, 2, 3), np.uint8),
        agent=agent,
        block=None if block is None else np.asarray(block, float),
        coverage=None if coverage is None else np.asarray(coverage, float),
        success=False,
    )


def test_distances_are_means_over_the_common_timesteps():
    demo = path([[0, 0], [0, 1], [0, 2], [0, 3]], [[1, 1], [1, 1], [1, 1]], [0.1, 0.2, 0.3])
    played = path([[0, 0], [3, 5], [0, 2]], [[1, 1], [1, 4]], [0.5, 0.25])
    found = compare_traces(demo, played)
    assert found == {
        "agent": pytest.approx((0 + 5 + 0) / 3),
        "block": pytest.approx((0 + 3) / 2),
        "coverage": 0.25,
        "max_coverage": 0.5,
        "success": False,
    }
    assert set(compare_traces(path([[0, 0], [0, 1]]), path([[0, 0], [0, 1]]))) == {"agent", "success"}


def rows(matching, wrong):
    return [
        {"matching": {"agent": m, "success": False}, "wrong": {"agent": w, "success": False}}
        for m, w in zip(matching, wrong, strict=True)
    ]


@pytest.mark.parametrize(
    ("matching", "wrong", "message"),
    [
        ([10, 12, 11, 9], [100, 120, 90, 110], "follows its guide"),
        ([80, 82, 81, 79], [100, 120, 90, 110], "steers the policy a little"),
        ([100, 120, 90, 110], [105, 95, 118, 99], "ignores its guide"),
    ],
)
def test_the_verdict_matches_the_distances(matching, wrong, message):
    found = summarize(rows(matching, wrong))
    assert message in found["verdict"]
    assert found["ratio"] == pytest.approx(np.mean(matching) / np.mean(wrong))
    low, high = found["conditions"]["matching"]["agent"]["ci95"]
    assert low <= np.mean(matching) <= high


def test_one_demonstration_has_no_wrong_guide():
    with pytest.raises(UserError, match="demos must be between 2 and 1000000, got 1"):
        CheckGuidanceConfig(policy="p", lam="l", out="o", demos=1)
