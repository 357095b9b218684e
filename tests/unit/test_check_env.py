"""`latentact.check_env` names the rule that an environment breaks."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest

import latentact
from latentact.envs.spec import ENVS, EnvError, env_spec, make_env
from latentact.errors import UserError

NAME = "babyai/GoToRedBall"


class Faulty(gymnasium.Wrapper):
    """Changes what an environment returns."""

    def __init__(self, reset=None, step=None):
        super().__init__(make_env(NAME))
        self.change_reset, self.change_step = reset, step

    def reset(self, **given):
        result = self.env.reset(**given)
        return self.change_reset(*result) if self.change_reset else result

    def step(self, action):
        result = self.env.step(action)
        return self.change_step(*result) if self.change_step else result


BUFFER = np.zeros((56, 56, 3), np.uint8)


def overwrite(observation):
    BUFFER[:] = observation["pixels"]
    BUFFER[0, 0] += 1
    return {**observation, "pixels": BUFFER}


def brighten(observation):
    return {**observation, "pixels": np.random.default_rng().integers(0, 256, (56, 56, 3), np.uint8)}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"reset": lambda o, i: o}, "reset must return an observation and info, got dict"),
        ({"reset": lambda o, i: (o, {})}, "info of reset must hold the task as a string, got None"),
        (
            {"reset": lambda o, i: ({**o, "pixels": o["pixels"] / 255}, i)},
            r"pixels of reset must be uint8 \[56, 56, 3\], got float64 \[56, 56, 3\]",
        ),
        (
            {"step": lambda o, *rest: ({"pixels": o["pixels"]}, *rest)},
            "the observation of step must have .*, got {'pixels'}",
        ),
        ({"step": lambda o, r, *rest: (o, np.nan, *rest)}, "the reward must be a finite float, got nan"),
        ({"step": lambda o, r, t, *rest: (o, r, 0, *rest)}, "terminated must be a bool, got 0"),
        (
            {"step": lambda o, r, t, u, i: (o, r, t, u, {"is_success": "yes"})},
            r"info\['is_success'\] must be a bool, got 'yes'",
        ),
        (
            {"step": lambda o, *rest: (brighten(o), *rest)},
            "same seed must give the same episode, got a different pixels",
        ),
        (
            {
                "reset": lambda o, i: (overwrite(o), i),
                "step": lambda o, *rest: (overwrite(o), *rest),
            },
            "pixels must be a new array at each step",
        ),
        (
            {"step": lambda o, *rest: ({**o, "agent_pos": o["agent_pos"] * np.float32(np.nan)}, *rest)},
            "agent_pos of step must be finite",
        ),
    ],
)
def test_a_broken_rule_is_named(fault, message):
    with pytest.raises(EnvError, match=message):
        latentact.check_env(Faulty(**fault))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 0}, "spec.fps must be at least 1, got 0"),
        ({"camera": "front"}, "spec.camera must start with observation.image, got 'front'"),
        ({"action_names": ("left",)}, "spec.action_names must have 7 names, got 1"),
        ({"state_names": ()}, "spec.state_names must have 7 names, got 0"),
        (
            {"action_space": latentact.ActionSpace(kind="continuous", size=7)},
            "spec.action_space must be that",
        ),
    ],
)
def test_a_wrong_spec_is_named(change, message):
    with pytest.raises(EnvError, match=message):
        latentact.check_env(make_env(NAME), spec=replace(env_spec(NAME), **change))


def test_spaces_are_checked():
    env = Faulty()
    env.observation_space = gymnasium.spaces.Box(0, 255, (56, 56, 3), np.uint8)
    with pytest.raises(EnvError, match="observation_space must be a Dict of pixels"):
        latentact.check_env(env)
    env = Faulty()
    env.action_space = gymnasium.spaces.MultiDiscrete([2, 2])
    with pytest.raises(EnvError, match="action_space must be a Discrete or a one-dimensional Box"):
        latentact.check_env(env)


def test_a_suite_from_outside_is_checked_by_name(monkeypatch):
    class Outside:
        def check(self, name):
            pass

        def make(self, name, resolution, view):
            return Faulty(
                step=lambda o, r, *rest: (o, np.inf, *rest) if name.endswith("bad") else (o, r, *rest)
            )

        def spec(self, name, view):
            return env_spec(NAME)

        def expert(self, name, env, seed):
            raise UserError(f"{name} has no expert.")

    ENVS.names()  # built-in suites are loaded before the copy is made
    monkeypatch.setattr(ENVS, "_items", dict(ENVS._items))
    ENVS.register("outside")(Outside)
    latentact.check_env("outside/good")
    with pytest.raises(EnvError, match="the reward must be a finite float, got inf"):
        latentact.check_env("outside/bad")
