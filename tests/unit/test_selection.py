"""The choice among discrete actions: the most likely one, or one drawn by its probability."""

import json

import pytest
import torch
from torch import Tensor

from latentact.errors import UserError
from latentact.policies.selection import greedy, selector
from latentact.stages import rollout
from toy_env import Toy, constant_policy, toy


def shares(choose, scores: Tensor) -> list[float]:
    torch.manual_seed(0)
    drawn = choose(scores.expand(40, 500, -1))
    assert drawn.shape == (40, 500)
    assert drawn.dtype == torch.int64
    return [(drawn == i).float().mean().item() for i in range(scores.shape[-1])]


def test_actions_are_drawn_by_their_probability() -> None:
    scores = torch.tensor([0.7, 0.2, 0.1]).log()
    assert shares(selector("sample", 1.0), scores) == pytest.approx([0.7, 0.2, 0.1], abs=0.015)
    cold = [0.49 / 0.54, 0.04 / 0.54, 0.01 / 0.54]  # the squares, normalized
    assert shares(selector("sample", 0.5), scores) == pytest.approx(cold, abs=0.015)
    assert shares(selector("greedy", 1.0), scores) == [1, 0, 0]
    assert shares(greedy, scores) == [1, 0, 0]


def played(tmp_path, out: str, **settings) -> list[int]:
    policy = constant_policy(tmp_path / "policy", 1)
    name = toy("Drawn-v0", limit=40)
    rollout.run(
        rollout.RolloutConfig(
            policy=str(policy), env=name, out=str(tmp_path / out), episodes=2, record=0, **settings
        )
    )
    return [int(action) for action in Toy.taken]


def test_a_rollout_draws_actions_and_repeats_them(tmp_path) -> None:
    assert set(played(tmp_path, "greedy")) == {1}
    drawn = played(tmp_path, "drawn", action_selection="sample")
    assert 0.55 < sum(drawn) / len(drawn) < 0.9  # the softmax of 0 and 1 is 0.73
    assert played(tmp_path, "again", action_selection="sample") == drawn
    assert played(tmp_path, "other", action_selection="sample", seed=7) != drawn
    assert set(played(tmp_path, "cold", action_selection="sample", temperature=0.01)) == {1}
    assert json.loads((tmp_path / "drawn/rollout.json").read_text())["config"]["action_selection"] == "sample"


def test_a_rollout_of_an_earlier_release_is_still_finished(tmp_path) -> None:
    played(tmp_path, "old")
    written = tmp_path / "old/rollout.json"
    content = json.loads(written.read_text())
    del content["config"]["action_selection"], content["config"]["temperature"]
    written.write_text(json.dumps(content))
    assert played(tmp_path, "old") == []  # not played again
    with pytest.raises(UserError, match="must be empty or hold this rollout"):
        played(tmp_path, "old", action_selection="sample")


def test_other_values_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"--action-selection must be greedy or sample, got 'best'\."):
        played(tmp_path, "a", action_selection="best")
    with pytest.raises(UserError, match=r"--temperature must be between 0\.001 and 1000, got 0\."):
        played(tmp_path, "a", temperature=0.0)
