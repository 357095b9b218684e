"""Every environment suite keeps the contract of `make_env`, `env_spec` and `make_expert`."""

import numpy as np
import pytest

from conftest import needs_gl
from latentact import check_env
from latentact.envs.spec import ENVS, env_spec, make_env, make_expert

REACH = pytest.param("metaworld/reach-v3", marks=needs_gl)
EXAMPLES = {
    "babyai": "babyai/GoToLocal",
    "gymnasium": "CartPole-v1",
    "metaworld": REACH,
    "procgen": "procgen/coinrun-hard",
    "pusht": "pusht",
    "xland": "xland/R1-9x9/3",
}
PICTURES = [name for suite, name in EXAMPLES.items() if suite != "xland"]
WITH_EXPERT = [
    *("babyai/GoToRedBall", "babyai/GoToLocal", "babyai/PickupLoc", "pusht", REACH, "xland/R1-9x9/3"),
    "procgen/maze",
]
EXTRAS = {"xland": "xminigrid", "procgen": "envpool"}


@pytest.fixture(autouse=True)
def _needs_its_extra(request):
    for suite, module in EXTRAS.items():
        if suite in request.node.name:
            pytest.importorskip(module)


FULL = [
    pytest.param("babyai/GoTo full", id="babyai full"),
    pytest.param("metaworld/reach-v3 full", id="metaworld full", marks=needs_gl),
]


@pytest.fixture(params=[*EXAMPLES.values(), *FULL])
def made(request, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    name, _, view = request.param.partition(" ")
    view = view or "agent"
    env = make_env(name, view=view)
    yield name, view, env
    env.close()


def test_every_suite_has_an_example():
    assert set(ENVS.names()) == set(EXAMPLES)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_accepts_it(made):
    from gymnasium.utils.env_checker import check_env

    check_env(made[2], skip_render_check=True)


def test_spec_matches_the_environment(made):
    name, view, env = made
    spec = env_spec(name, view=view)
    observation, info = env.reset(seed=3)
    assert observation["pixels"].std() > 0
    assert len(spec.state_names) == len(observation.get("agent_pos", ()))
    assert bool(info["task"]) == (spec.camera != "observation.images.camera")


def test_check_env_accepts_it(made):
    name, view, env = made
    check_env(env, spec=env_spec(name, view=view), seed=11)
    check_env(name, view=view)


@pytest.mark.parametrize("name", PICTURES)
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
