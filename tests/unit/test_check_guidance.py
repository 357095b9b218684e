"""The measures and verdict of `check-guidance`, on paths made by hand."""

import numpy as np
import pytest

from latentact.errors import UserError
from latentact.evaluation.policy.guidance import EpisodeTrace, compare_traces, summarize
from latentact.evaluation.policy.guide_operations import Rollouts, evaluate, measure
from latentact.reporting.pages.guidance import write_page
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


def along(*x):
    """A path on the horizontal axis."""
    return np.stack([np.array(x, float), np.zeros(len(x))], 1)


def rollouts(**changes):
    """Rollouts that follow the edits; a goes up to 8, b down to -8, on the horizontal axis."""
    a, b = along(*range(9)), along(*(-i for i in range(9)))
    paths = {
        "a": a,
        "b": b,
        "blend": along(0, 0, 0),
        "start": a,
        "end": b,
        "concat": along(0, 1, 2, 3, 1, -1, -2, -3),
        "replace": along(0, 1, 2, 1, 0, 1, 2, 3, 4),
        "scale": along(*[0.2] * 9),
    } | changes.pop("paths", {})
    given = {"second": b, "first_end": 2, "second_start": 5, "segment": range(3, 4), "horizon": 1}
    return Rollouts(paths=paths, **given | changes)


def test_measures_of_edited_guides_by_hand():
    found = measure(rollouts())
    assert found == {
        "blend": pytest.approx({"to_first": 4, "to_second": 4, "parents": 8, "margin": 4}),
        "interpolate": pytest.approx({"largest": 0, "margin": 1e-6}),
        # -1, -2, -3 beside 0, -1, -2; staying at 2 would be 2, 3, 4 away
        "concat": pytest.approx({"distance": 1, "stayed": 3, "shape": 0, "margin": 0.5}),
        # steps 2 to 4 may differ: by 2, 2 and 0; the path stays 4 behind
        "replace": pytest.approx({"before": 0, "inside": 4 / 3, "after": 0, "path": 4, "margin": 2 / 3}),
        "scale": pytest.approx({"moved": 4, "still": 0, "margin": 0.4}),
    }


def test_rollouts_that_do_not_do_what_the_edits_say():
    a, early = along(*range(9)), along(0, 5, 2, 1, 0, 1, 2, 3, 4)
    wrong = {
        "blend": a + np.array([0, 20]),
        "end": a,
        "concat": along(0, 1, 2, 3, 4, 5),
        "replace": early,
        "scale": a,
    }
    found = evaluate([measure(rollouts(paths=wrong)), measure(rollouts(paths=wrong))])
    assert [name for name in found if found[name]["passes"]] == []
    assert found["replace"]["numbers"]["margin"]["mean"] == -4  # step 1 is outside of the segment
    assert found["scale"]["verdict"] == "Not with this LAM and policy: scaled by 0, the agent stands still."
    assert all(each["passes"] for each in evaluate([measure(rollouts())]).values())


def test_rollouts_that_end_early_are_not_evaluated(tmp_path):
    short = {"concat": along(0, 1, 2), "replace": along(0, 1, 2)}
    found = evaluate([measure(rollouts(paths=short)), measure(rollouts())])
    assert [each["pairs"] for each in found.values()] == [2, 2, 1, 1, 2]
    only = evaluate([measure(rollouts(paths=short))])
    assert not only["concat"]["passes"]
    assert only["concat"]["verdict"].startswith("Not measured, because every rollout ended early")
    result = {**summarize(rows([10, 12], [100, 120])), "operations": only, "config": {"policy": "<p>"}}
    write_page(tmp_path / "guidance.html", result)
    page = (tmp_path / "guidance.html").read_text()
    assert "Rollouts follow 3 of 5 operations on guides." in page
    assert "&lt;p&gt;" in page


def test_one_demonstration_has_no_wrong_guide():
    with pytest.raises(UserError, match="demos must be between 2 and 1000000, got 1"):
        CheckGuidanceConfig(policy="p", lam="l", out="o", demos=1)
