"""Meta-World: what LeRobot's environment shows, experts, several tasks, drawing, distractors."""

import importlib.util
import warnings

import numpy as np
import pytest

import latentact.envs.suites.metaworld as suite
from conftest import cli, needs_gl
from latentact.data.cache import DataConfig, open_store
from latentact.envs.distract import Distraction
from latentact.envs.spec import env_spec, make_env
from latentact.errors import UserError

DRAWER = "metaworld/drawer-open-v3"


def lerobot(task, actions, seed):
    """Return frames and states of LeRobot's environment, drawn as ours: without shadows and smooth edges."""
    import mujoco
    from lerobot.envs.metaworld import MetaworldEnv

    env = MetaworldEnv(task, obs_type="pixels_agent_pos")
    env._ensure_env()
    env._env.model.vis.quality.offsamples, env._env.model.vis.quality.shadowsize = 0, 1
    viewer = env._env.mujoco_renderer._get_viewer("rgb_array")
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        viewer.scn.flags[flag] = False
    observations = [env.reset(seed=seed)[0], *(env.step(action)[0] for action in actions)]
    env.close()
    return observations


@needs_gl
def test_lerobots_environment_shows_the_same():
    suite.choose_gl()
    task = "assembly-v3"
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32)
    theirs = lerobot(task, actions, seed=3)
    env = make_env(f"metaworld/{task}", resolution=480)
    ours = [env.reset(seed=3)[0], *(env.step(action)[0] for action in actions)]
    for a, b in zip(theirs, ours, strict=True):
        assert np.array_equal(a["pixels"], b["pixels"])
        assert np.array_equal(a["agent_pos"].astype(np.float32), b["agent_pos"])
    env.close()


@needs_gl
def test_full_view_has_the_whole_observation():
    env, agent = (make_env(DRAWER, resolution=32, view=view) for view in ("full", "agent"))
    names = env_spec(DRAWER, view="full").state_names
    for world in (env, agent):
        world.reset(seed=5)
    before = env.unwrapped.observation.astype(np.float32)
    action = np.array([0.3, -1, 0.5, -1], np.float32)
    state, hand = env.step(action)[0]["agent_pos"], agent.step(action)[0]["agent_pos"]
    assert np.array_equal(state, env.unwrapped.observation.astype(np.float32))
    assert len(names) == len(set(names)) == len(state) == 39
    np.testing.assert_allclose(state[:4], hand, atol=1e-6)  # the agent's is clipped to its range
    previous = [names.index(f"previous_{name}") for name in names[:18]]
    assert np.array_equal(state[previous], before[:18])
    handle = [names.index(f"object_{axis}") for axis in "xyz"]
    assert np.allclose(state[handle], env.unwrapped.simulation._get_pos_objects())
    goal = [names.index(f"goal_{axis}") for axis in "xyz"]
    assert np.allclose(state[goal], env.unwrapped.simulation._target_pos)
    env.close()
    agent.close()


def test_rate_limit_and_texts_are_lerobots():
    suite.choose_gl()
    from lerobot.envs import metaworld as theirs
    from lerobot.envs.configs import MetaworldEnv

    assert theirs.TASK_DESCRIPTIONS == suite.TASKS
    spec = env_spec(DRAWER)
    assert (spec.fps, len(spec.state_names)) == (MetaworldEnv().fps, theirs.OBS_DIM)
    assert spec.camera in MetaworldEnv().features_map.values()


@pytest.mark.parametrize(
    "task", ["button-press-topdown-v3", "door-open-v3", "pick-place-v3", "window-close-v3"]
)
def test_experts_succeed_and_are_functions_of_the_observation(task):
    world = suite.world_of(f"metaworld/{task}")
    for seed in range(3):
        observation, _ = world.reset(seed=seed)
        expert, ended, steps = suite._Scripted(world), False, 0
        while not ended:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                action = expert.act()
            assert np.array_equal(action, suite._Scripted(world).act())
            assert np.abs(action).max() <= 1
            observation, _, ended, truncated, info = world.step(action)
            steps += 1
            assert not truncated
        assert info["success"] == 1
        assert 20 < steps < 150
        assert np.array_equal(world.observation, observation)
    world.close()


def test_an_episode_ends_after_500_steps():
    world = suite.world_of(DRAWER)
    world.reset(seed=0)
    ends = [world.step(np.zeros(4))[2:4] for _ in range(500)]
    assert ends == [(False, False)] * 499 + [(False, True)]


def test_the_seed_gives_the_task_and_the_start():
    world = suite.world_of("metaworld/reach-v3, push-v3")
    starts = []
    for seed in (0, 1, 2, 3, 2):
        starts.append(world.reset(seed=seed)[0])
        assert world.task == ("reach-v3", "push-v3")[seed % 2]
    assert np.array_equal(starts[2], starts[4])
    assert not np.array_equal(starts[0], starts[2])
    alone = suite.world_of("metaworld/reach-v3")
    assert np.array_equal(alone.reset(seed=2)[0], starts[2])
    assert len(suite._tasks("metaworld/all")) == 50


@needs_gl
def test_a_background_moves_behind_the_robot_and_the_table():
    distraction = Distraction(background=1.0, shake=0.0, correlation=1.0)
    plain, distracted = make_env(DRAWER), make_env(DRAWER, distract=distraction)
    frames = [env.reset(seed=0)[0]["pixels"] for env in (plain, distracted)]
    changed = (frames[0] != frames[1]).any(-1)
    hidden = distracted.unwrapped.camera(84).background()
    assert 0.25 < hidden.mean() < 0.6
    assert hidden[:20, 60:].all()  # beside the robot
    assert not hidden[-20:, 30:50].any()  # the table
    assert not changed[~hidden].any()
    assert changed[hidden].mean() > 0.9
    _, _, _, _, info = distracted.step(np.array([1.0, -0.5, 0, 0], np.float32))
    assert info["nuisance"] == pytest.approx([0.02, -0.01, 0, 0])
    plain.close()
    distracted.close()


@needs_gl
def test_several_tasks_become_one_dataset_with_a_text_for_each(tmp_path):
    out = tmp_path / "data"
    arguments = ("collect", "metaworld/all", "--episodes", "3", "--workers", "1", "--out", out)
    done = cli(*arguments, "--tasks", "reach-v3,button-press-v3")
    assert done.returncode == 0, done.stderr
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/data", root=out)
    firsts = [dataset[i] for i in dataset.meta.episodes["dataset_from_index"]]
    texts = ["Reach a goal position", "Press a button"]
    assert [first["task"] for first in firsts] == [texts[0], texts[1], texts[0]]
    env = make_env("metaworld/button-press-v3")
    observation, _ = env.reset(seed=1)
    assert np.array_equal(firsts[1]["observation.state"].numpy(), observation["agent_pos"])
    pixels = (firsts[1]["observation.image"].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(pixels, observation["pixels"])
    assert open_store(DataConfig(path=str(out), resolution=84)).frames.shape[1:] == (84, 84, 3)
    refused = cli(*arguments, "--tasks", "reach-v3")
    assert "different settings (env)" in refused.stderr


def test_what_does_not_exist_is_one_sentence(monkeypatch):
    with pytest.raises(
        UserError, match="unknown Meta-World task 'drawer-open-v4'; did you mean 'drawer-open-v3'"
    ):
        env_spec("metaworld/reach-v3,drawer-open-v4")
    assert "tasks must be empty for" in cli("collect", "pusht", "--tasks", "a", "--out", "x").stderr
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "metaworld" else find(name))
    with pytest.raises(UserError, match=r"'metaworld' is not installed; .* 'latentact\[metaworld\]'"):
        env_spec(DRAWER)


@pytest.mark.parametrize(
    ("found", "chosen"), [({"EGL", "OSMesa"}, "egl"), ({"OSMesa"}, "osmesa"), (set(), None)]
)
def test_drawing_without_a_display(found, chosen, monkeypatch):
    monkeypatch.setattr(suite.ctypes.util, "find_library", lambda name: name if name in found else None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setenv("DISPLAY", "")
    if chosen is None:
        with pytest.raises(
            UserError, match=r"must draw .* got none that works without a display\. Install EGL"
        ):
            suite.choose_gl()
        return
    suite.choose_gl()
    assert suite.os.environ["MUJOCO_GL"] == chosen


@needs_gl
def test_mujoco_may_have_been_imported_before_the_choice(monkeypatch):
    suite.choose_gl()
    monkeypatch.setattr(importlib.import_module("mujoco"), "GLContext", None)
    context = suite._gl_context.__wrapped__()
    assert type(context).__module__ == f"mujoco.{suite.os.environ['MUJOCO_GL']}"
    context.free()
