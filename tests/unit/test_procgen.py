"""Procgen: levels by seed, the planner of mazes, recording, and data in the layout that LAPO publishes."""

import importlib.util
import json

import numpy as np
import pytest

from conftest import ok, refused
from latentact.data.cache import DataConfig, open_store
from latentact.envs.distract import Distraction
from latentact.envs.spec import env_spec, make_env, make_expert
from latentact.envs.suites import procgen
from latentact.errors import UserError

MAZE = "procgen/maze"
needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="needs envpool")


@needs_envpool
def test_every_game_has_easy_and_hard_levels_by_seed():
    for game in procgen.GAMES:
        firsts = []
        for name, seed in ((game, 3), (f"{game}/3", 9), (f"{game}-hard", 4)):
            env = make_env(f"procgen/{name}")
            observation, info = env.reset(seed=seed)
            assert observation["pixels"].shape == (64, 64, 3)
            assert info["level_seed"] == (4 if "hard" in name else 3)
            firsts.append(observation["pixels"])
            env.close()
        assert np.array_equal(firsts[0], firsts[1])
        assert not np.array_equal(firsts[0], firsts[2])


@needs_envpool
@pytest.mark.parametrize("name", [MAZE, "procgen/maze-hard"])
def test_the_planner_reaches_the_cheese_from_anywhere(name):
    env = make_env(name)
    for seed in (34, 55, 131):  # levels with frames that do not show where the mouse looks, and long ones
        env.reset(seed=seed)
        expert, random = make_expert(name, env, seed), np.random.default_rng(seed)
        ended = any(env.step(random.integers(len(procgen.ACTIONS)))[2] for _ in range(10))
        steps = 0
        while not ended:
            _, reward, ended, truncated, info = env.step(expert.act())
            steps += 1
            assert not truncated
        assert steps < 120
        assert (reward, info["is_success"]) == (10, True)
    env.close()


@needs_envpool
def test_a_move_goes_where_its_name_says():
    env = make_env(f"{MAZE}/4")
    before = env.reset()[0]["pixels"].astype(int)
    names = env_spec(MAZE).action_names
    assert [names[i] for i in procgen.MOVES] == ["left", "down", "up", "right"]
    for name, (x, y) in {"right": (1, 0), "up": (0, -1), "left_down": (-1, 1), "q": (0, 0)}.items():
        assert np.sign(procgen._heading(names.index(name))).tolist() == [x, y]
    after = env.step(names.index("wait"))[0]["pixels"]
    assert np.array_equal(after, before)
    shaken = make_env(MAZE, distract=Distraction(shake=1.0, correlation=1.0))
    shaken.reset(seed=4)
    assert shaken.step(names.index("right"))[4]["nuisance"][2] > 0


@needs_envpool
def test_recorded_and_played(tmp_path):
    data = tmp_path / "data"
    ok("collect", MAZE, "--episodes", "4", "--workers", "1", "--out", data)
    store = open_store(DataConfig(path=str(data), resolution=64))
    assert store.num_episodes == 4
    assert store.action_space is not None
    assert store.action_space.size == 15
    lam, labels, policy, ground = (f"{tmp_path}/{name}" for name in ("lam", "labels", "policy", "ground"))
    short = ("smoke_test=true", "training.batch_size=4")
    ok("train-lam", "experiment=lapo_procgen", f"data.path={data}", f"out={lam}", *short)
    ok("label", "--lam", lam, "--data", data, "--out", labels)
    ok("train-policy", "experiment=lapo_agent_procgen", f"labels={labels}", f"out={policy}", *short)
    given = ("experiment=lapo_action_decoder_procgen", f"labels={labels}", f"policy={policy}")
    ok("ground", *given, "labeled_episodes=2", f"out={ground}", *short)
    online = ("mode=online", f"online.lam={lam}", "online.finetune_steps=64")
    ok("ground", *given, *online, f"out={tmp_path}/online", *short)
    rows = json.loads((tmp_path / "online/ground.json").read_text())["rows"]
    assert [*rows] == ["paired", "decoder", "finetuned", "scratch", "expert"]
    assert rows["expert"]["success"] >= 0.5  # of two episodes of at most 20 steps
    ok("rollout", "experiment=lapo_procgen", "smoke_test=true", "--policy", ground, "--out", tmp_path / "r")
    assert "only these games have an expert" in refused(
        "collect", "procgen/bigfish", "--out", tmp_path / "no"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("procgen", "unknown Procgen game ''"),
        ("procgen/mase", "unknown Procgen game 'mase'; did you mean 'maze'"),
        ("procgen/maze-easy", "did you mean 'maze'"),
        ("procgen/maze/-1", "must be a seed from 0 to 2147483647, got '-1'"),
        ("procgen/maze-hard/2147483648", "got '2147483648'. Give one such as procgen/maze-hard/7"),
    ],
)
def test_what_does_not_exist_is_one_sentence(name, said):
    with pytest.raises(UserError, match=said):
        env_spec(name)


def test_a_missing_extra_is_one_sentence(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "envpool" else find(name))
    with pytest.raises(UserError, match=r"^'envpool' is not installed; .*latentact\[procgen\]'\.$"):
        env_spec(MAZE)


LENGTHS = ((9, 7, 12), (5, 11), (8, 6, 4))
"""Episodes of the files `train/0.npz`, `train/1.npz` and `test/0.npz`."""


def lapo_files(folder, first):
    """Write files as LAPO's `expert_data/GAME`; `done` marks the first frame of an episode, or the last."""
    for name, lengths in zip(("train/0", "train/1", "test/0"), LENGTHS, strict=True):
        random = np.random.default_rng(len(lengths) + lengths[0])
        n, ends = sum(lengths), np.cumsum(lengths)
        obs = np.repeat(random.integers(0, 256, (len(lengths), 64, 64, 3), np.uint8), lengths, axis=0)
        for row in range(n):
            obs[row, row : row + 4, :4] = 255
        done = np.zeros(n, bool)
        done[np.r_[0, ends[:-1]] if first else ends - 1] = True
        path = folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        floats = {
            key: random.normal(size=n).astype(np.float32) for key in ("rewards", "ep_returns", "values")
        }
        np.savez_compressed(path, obs=obs, ta=np.arange(n) % 15, done=done, **floats)
    return folder


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_expert_data_of_lapo_is_read_as_it_lies(tmp_path, first):
    folder = lapo_files(tmp_path / "expert_data/maze", first)
    store = open_store(DataConfig(path=str(folder / "train"), resolution=64))
    assert store.lengths.tolist() == [*LENGTHS[0], *LENGTHS[1]]
    with np.load(folder / "train/1.npz") as second:
        assert np.array_equal(store.frames[store.starts[3] :], second["obs"])
        assert np.array_equal(np.ma.getdata(store.actions([*range(5)]))[store.starts[3] :], second["ta"])
        for name in ("rewards", "ep_returns", "values"):
            column = store.column(name)
            assert column.dtype == np.float32
            assert np.array_equal(column[store.starts[3] :], second[name])
    both = open_store(DataConfig(path=str(folder), resolution=64))
    assert sorted(both.lengths.tolist()) == sorted(length for part in LENGTHS for length in part)
    shown = ok("check-data", folder / "train").stdout
    assert "5 episodes" in shown
    assert ("first frame of an episode" in shown) == first
