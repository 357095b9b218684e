import numpy as np
import pytest

from latentact.envs.spec import ExpertStuckError, env_spec, make_env, make_expert
from latentact.errors import UserError


def test_unknown_level_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'GoToRedBall'"):
        make_env("babyai/GoToRedBal")


def test_unknown_environment_names_the_nearest_suite():
    with pytest.raises(UserError, match="did you mean 'pusht'"):
        make_env("pushd")


@pytest.mark.parametrize("name", ["NoSuch-v0", "pusht/hard", "nowhere:NoSuch-v0", ""])
def test_unknown_names_are_user_errors(name):
    with pytest.raises(UserError):
        env_spec(name)


def test_unknown_view_is_a_user_error():
    with pytest.raises(UserError, match="did you mean 'full'"):
        make_env("babyai/GoToRedBall", view="ful")


def test_negative_resolution_is_a_user_error():
    with pytest.raises(UserError, match="-1"):
        make_env("pusht", resolution=-1)


def test_any_version_of_a_level_is_found():
    assert make_env("babyai/GoToObjS6").unwrapped.spec.id == "BabyAI-GoToObjS6-v1"


def test_babyai_state_and_success():
    env = make_env("babyai/GoToRedBall")
    observation, info = env.reset(seed=3)
    grid = env.unwrapped
    x, y, *facing, carrying = observation["agent_pos"]
    assert (x, y) == tuple(grid.agent_pos)
    assert facing == [float(i == grid.agent_dir) for i in range(4)]
    assert carrying == 0
    assert "ball" in info["task"]
    observation, _, _, _, info = env.step(0)
    assert observation["agent_pos"][2:6].argmax() == grid.agent_dir != facing.index(1.0)
    assert info["is_success"] is False


def test_babyai_views():
    assert make_env("babyai/GoToRedBall").observation_space["pixels"].shape == (56, 56, 3)
    assert make_env("babyai/GoToRedBall", view="full").observation_space["pixels"].shape == (64, 64, 3)
    assert env_spec("babyai/GoToRedBall", view="full").camera == "observation.images.full"


def test_minigrid_prints_nothing(capfd):
    env = make_env("babyai/GoToLocal")
    for seed in range(30):
        env.reset(seed=seed)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("level", "seed"), [("KeyInBox", 0), ("GoToImpUnlock", 0)])
def test_a_bot_that_gives_up_or_never_ends_is_stuck(level, seed):
    env = make_env(f"babyai/{level}")
    for attempt in range(seed, seed + 12):
        env.reset(seed=attempt)
        expert = make_expert(f"babyai/{level}", env, attempt)
        try:
            for _ in range(600):
                _, _, terminated, truncated, _ = env.step(expert.act())
                if terminated or truncated:
                    break
        except ExpertStuckError:
            return
    pytest.fail("the bot was never stuck")


def test_no_expert_is_a_user_error():
    env = make_env("CartPole-v1")
    with pytest.raises(UserError, match="no scripted expert"):
        make_expert("CartPole-v1", env, 0)


def test_gymnasium_environments_of_every_image_kind(monkeypatch):
    gymnasium = pytest.importorskip("gymnasium")

    class Toy(gymnasium.Env):
        def __init__(self, space):
            self.observation_space = space
            self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.observation_space.seed(seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 1.0, True, False, {"success": True}

    image = gymnasium.spaces.Box(0, 255, (20, 30, 3), np.uint8)
    vector = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    kinds = {
        "Image": (image, ()),
        "Pixels": (gymnasium.spaces.Dict(pixels=image, agent_pos=vector), (4,)),
        "Named": (gymnasium.spaces.Dict(image=image), ()),
    }
    for name, (space, state) in kinds.items():
        monkeypatch.setitem(gymnasium.registry, f"Toy{name}-v0", gymnasium.envs.registration.EnvSpec(
            id=f"Toy{name}-v0", entry_point=lambda space=space: Toy(space)
        ))  # fmt: skip
        env = make_env(f"Toy{name}-v0")
        observation, info = env.reset(seed=0)
        assert observation["pixels"].shape == (20, 30, 3)
        assert observation.get("agent_pos", np.zeros(0)).shape == (state or (0,))
        assert "is_success" not in info
        assert env.step(np.zeros(2, np.float32))[4]["is_success"] is True
        spec = env_spec(f"Toy{name}-v0")
        assert (spec.action_space.kind, spec.action_space.size) == ("continuous", 2)
        assert len(spec.state_names) == sum(state)

    monkeypatch.setitem(gymnasium.registry, "ToyVector-v0", gymnasium.envs.registration.EnvSpec(
        id="ToyVector-v0", entry_point=lambda: Toy(vector)
    ))  # fmt: skip
    with pytest.raises(UserError, match="no RGB image"):
        make_env("ToyVector-v0")


def test_gymnasiums_name_of_pusht_is_pusht():
    assert env_spec("gym_pusht/PushT-v0") == env_spec("PushT-v0") == env_spec("pusht")
