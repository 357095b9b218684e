"""Every environment suite keeps the promises of `make_env`, `env_spec` and `make_expert`."""

import numpy as np
import pytest

from latentact.envs.spec import ENVS, env_spec, make_env, make_expert

EXAMPLES = {"babyai": "babyai/GoToLocal", "pusht": "pusht", "gymnasium": "CartPole-v1"}
WITH_EXPERT = ["babyai/GoToRedBall", "babyai/GoToLocal", "babyai/PickupLoc", "pusht"]


@pytest.fixture(params=[*EXAMPLES.values(), "full"])
def made(request, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    name, view = ("babyai/GoTo", "full") if request.param == "full" else (request.param, "agent")
    env = make_env(name, view=view)
    yield name, view, env
    env.close()


def test_every_suite_has_an_example():
    assert set(ENVS.names()) == set(EXAMPLES)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_accepts_it(made):
    from gymnasium.utils.env_checker import check_env

    check_env(made[2], skip_render_check=True)


def test_spec_says_what_the_environment_does(made):
    name, view, env = made
    spec = env_spec(name, view=view)
    observation, info = env.reset(seed=3)
    assert observation["pixels"].dtype == np.uint8
    assert observation["pixels"].shape[2] == 3
    assert observation["pixels"].std() > 0
    assert observation["agent_pos"].dtype == np.float32
    assert observation["agent_pos"].shape == (len(spec.state_names),)
    assert isinstance(info["task"], str)
    assert spec.fps > 0
    assert len(spec.action_names) == spec.action_space.size
    if spec.action_space.discrete:
        assert env.action_space.n == spec.action_space.size
    else:
        assert env.action_space.shape == (spec.action_space.size,)


def test_the_same_seed_is_the_same_episode(made):
    _, _, env = made
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(5)]

    def play():
        frames = [env.reset(seed=11)[0]["pixels"]]
        return np.stack(frames + [env.step(action)[0]["pixels"] for action in actions])

    assert (play() == play()).all()


@pytest.mark.parametrize("name", EXAMPLES.values())
@pytest.mark.parametrize("resolution", [48, 100])
def test_resolution_is_the_size_of_the_frames(name, resolution, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    observation, _ = make_env(name, resolution=resolution).reset(seed=0)
    assert observation["pixels"].shape == (resolution, resolution, 3)


@pytest.mark.parametrize("name", WITH_EXPERT)
def test_expert_solves_and_repeats_itself(name):
    env = make_env(name)

    def play(seed):
        env.reset(seed=seed)
        expert, actions = make_expert(name, env, seed), []
        while True:
            actions.append(expert.act())
            _, _, terminated, truncated, info = env.step(actions[-1])
            if terminated or truncated:
                return np.array(actions), info["is_success"]

    outcomes = [play(seed) for seed in range(5)]
    assert [success for _, success in outcomes] == [True] * 5
    again, _ = play(0)
    assert np.array_equal(outcomes[0][0], again)
