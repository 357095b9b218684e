"""Random colors of episodes, late and inexact actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentact.envs.distract import Distraction, Distractor
from latentact.envs.spec import make_env
from latentact.errors import UserError
from latentact.evaluation.policy.rollout import Disturbed, conditions, rollout
from latentact.stages.collect import CollectConfig, run


class Counter:
    """Acts with the number of the step, in two episodes."""

    def __init__(self, action: Any = float) -> None:
        self.step, self.action = 0, action

    def reset(self, num_envs: int) -> None:
        """Start over."""
        self.step = 0

    def act(self, observation: dict[str, Any]) -> list[Any]:
        """Return the step for both episodes."""
        self.step += 1
        return [self.action(self.step)] * 2


def test_actions_arrive_late() -> None:
    late = Disturbed(Counter(), [0, 1], 2, None, 0.0, None)
    late.reset(2)
    assert [late.act({})[0] for _ in range(5)] == [1, 1, 1, 2, 3], "the first action waits for no other"
    held = Disturbed(Counter(), [0, 1], 2, 6, 0.0, None)
    held.reset(2)
    assert [held.act({})[1] for _ in range(5)] == [6, 6, 1, 2, 3]
    held.reset(2)
    assert held.act({})[0] == 6


def test_noise_is_relative_to_half_the_range_and_clipped() -> None:
    ranges = np.array([[0.0, -1], [512, 1]])
    noisy = Disturbed(Counter(lambda _: np.array([256.0, 1])), [7, 8], 0, None, 0.1, ranges)
    noisy.reset(2)
    draws = np.random.default_rng((7, 4)).standard_normal(2)
    first = noisy.act({})[0]
    assert first[0] == pytest.approx(256 + 0.1 * 256 * draws[0])
    assert first[1] == pytest.approx(min(1, 1 + 0.1 * draws[1]))


def test_the_world_of_a_rollout_is_named() -> None:
    config = {"latency": 2, "action_noise": 0.1, "distract": "shake=0.3"}
    assert conditions({"config": config}) == "shake=0.3, latency 2 steps, action noise 0.1"
    assert conditions({"config": {"latency": 0}}) == conditions({}) == ""


def test_a_late_expert_is_another_rollout() -> None:
    """PushT's planner acts at every state, so that its own late actions lead it elsewhere."""
    changes: list[dict[str, Any]] = [{}, {"latency": 3}, {"action_noise": 0.5}, {"action_noise": 0.5}]
    films = [
        rollout(None, "pusht", episodes=1, seed=0, max_steps=6, record=1, **each).videos[0].tobytes()
        for each in changes
    ]
    assert len({*films}) == 3
    assert films[2] == films[3], "the noise follows from the seed"
    with pytest.raises(
        UserError, match="babyai/GoToLocal must have continuous actions with bounds for action_noise"
    ):
        rollout(None, "babyai/GoToLocal", episodes=1, seed=0, action_noise=0.1)


def test_appearance_by_hand() -> None:
    looks = np.random.default_rng((5, 3)).uniform(-1, 1, 8) * 0.5
    frame = np.full((2, 2, 3), 100, np.uint8)
    floor = np.array([[0.0, 1], [0, 0]])
    drawn = Distractor(Distraction(appearance=0.5), 5).draw(frame, floor)
    gains = (1 + 0.4 * looks[0]) * (1 + 0.3 * looks[1:4])
    painted = 100 + 0.6 * abs(looks[4]) * (127.5 * (1 + looks[5:]) - 100)
    assert drawn[0, 0].tolist() == (100 * gains).round().clip(0, 255).tolist()
    assert drawn[0, 1].tolist() == (painted * gains).round().clip(0, 255).tolist()


def test_every_episode_looks_different() -> None:
    env = make_env("pusht", distract=Distraction(appearance=1.0))
    first, again, other = (env.reset(seed=seed)[0]["pixels"] for seed in (1, 1, 2))
    later = env.step(np.array([256.0, 256]))[0]["pixels"]
    assert np.array_equal(first, again)
    corner = (slice(40, 44), slice(8, 12))
    assert not np.array_equal(first[corner], other[corner])
    assert np.array_equal(other[corner], later[corner]), "the same through the episode"


def test_collections_record_their_appearance(tmp_path: Path) -> None:
    settings = {"env": "babyai/GoToRedBallNoDists", "episodes": 2, "workers": 1}
    run(CollectConfig(out=str(tmp_path / "a"), distract="appearance=0.6", **settings))  # type: ignore[arg-type]
    info = json.loads((tmp_path / "a/meta/info.json").read_text())
    assert "observation.nuisance" not in info["features"], "nothing moves"
    held = json.loads((tmp_path / "a/meta/collect.json").read_text())
    assert held["distract"] == {"background": 0.0, "shake": 0.0, "correlation": 0.0, "appearance": 0.6}
    before = Distraction(shake=0.5).settings
    assert before == {"background": 0.0, "shake": 0.5, "correlation": 0.0}, "older collections stay the same"
