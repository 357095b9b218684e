"""What `check-guidance` measures and says, on paths made by hand."""

import numpy as np
import pytest

from latentact.errors import UserError
from latentact.stages import check_guidance as stage


def path(agent, block=None, coverage=None):
    agent = np.asarray(agent, float)
    return stage.EpisodeTrace(
        pixels=np.zeros((len(agent), 2, 2, 3), np.uint8),
        agent=agent,
        block=None if block is None else np.asarray(block, float),
        coverage=None if coverage is None else np.asarray(coverage, float),
        success=False,
    )


def test_distances_are_means_over_the_moments_that_both_have():
    demo = path([[0, 0], [0, 1], [0, 2], [0, 3]], [[1, 1], [1, 1], [1, 1]], [0.1, 0.2, 0.3])
    played = path([[0, 0], [3, 5], [0, 2]], [[1, 1], [1, 4]], [0.5, 0.25])
    found = stage._compare(demo, played)
    assert found == {
        "agent": pytest.approx((0 + 5 + 0) / 3),
        "block": pytest.approx((0 + 3) / 2),
        "coverage": 0.25,
        "max_coverage": 0.5,
        "success": False,
    }
    assert set(stage._compare(path([[0, 0], [0, 1]]), path([[0, 0], [0, 1]]))) == {"agent", "success"}


def rows(matching, wrong):
    return [
        {"matching": {"agent": m, "success": False}, "wrong": {"agent": w, "success": False}}
        for m, w in zip(matching, wrong, strict=True)
    ]


@pytest.mark.parametrize(
    ("matching", "wrong", "said"),
    [
        ([10, 12, 11, 9], [100, 120, 90, 110], "follows its guide"),
        ([80, 82, 81, 79], [100, 120, 90, 110], "steers the policy a little"),
        ([100, 120, 90, 110], [105, 95, 118, 99], "ignores its guide"),
    ],
)
def test_the_verdict_names_what_was_found(matching, wrong, said):
    found = stage._summary(rows(matching, wrong))
    assert said in found["verdict"]
    assert found["ratio"] == pytest.approx(np.mean(matching) / np.mean(wrong))
    low, high = found["conditions"]["matching"]["agent"]["ci95"]
    assert low <= np.mean(matching) <= high


def test_one_demonstration_has_no_wrong_guide():
    with pytest.raises(UserError, match="demos must be between 2 and 1000000, got 1"):
        stage.CheckGuidanceConfig(policy="p", lam="l", out="o", demos=1)
