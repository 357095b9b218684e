"""The floors of a comparison: agents that observe nothing."""

import numpy as np
import pytest

from latentact.agents.agent import Agent
from latentact.agents.blind import BlindAgent
from latentact.types import ActionSpace

OBSERVATION = {"task": [""] * 4}


def drawn(kind: str, space: ActionSpace, actions: np.ndarray, seed: int = 0) -> np.ndarray:
    agent = BlindAgent(kind, space, actions, seed)
    assert isinstance(agent, Agent)
    agent.reset(4)
    return np.concatenate([agent.act(OBSERVATION) for _ in range(1000)])


def test_discrete_actions() -> None:
    space, actions = ActionSpace(kind="discrete", size=3), np.array([0] * 8 + [2] * 2)
    uniform = np.bincount(drawn("uniform", space, actions), minlength=3) / 4000
    assert uniform == pytest.approx([1 / 3] * 3, abs=0.03)
    often = np.bincount(drawn("frequencies", space, actions), minlength=3) / 4000
    assert often == pytest.approx([0.8, 0, 0.2], abs=0.03)
    assert (drawn("uniform", space, actions) == drawn("uniform", space, actions)).all()
    assert (drawn("uniform", space, actions) != drawn("uniform", space, actions, seed=1)).any()


def test_values_of_a_discrete_space() -> None:
    space = ActionSpace(kind="discrete", size=2, values=(-1, 5))
    assert set(drawn("uniform", space, np.array([0, 1])).tolist()) == {-1, 5}


def test_continuous_actions() -> None:
    space, actions = ActionSpace(kind="continuous", size=2), np.array([[0, 10], [1, 30]], np.float32)
    uniform = drawn("uniform", space, actions)
    assert uniform.dtype == np.float32
    assert uniform.min(0) == pytest.approx([0, 10], abs=0.1)
    assert uniform.max(0) == pytest.approx([1, 30], abs=0.1)
    assert {tuple(row) for row in drawn("frequencies", space, actions).tolist()} == {(0, 10), (1, 30)}
