"""DAgger's rounds and GAIL's rewards, on worlds so small that every number is known."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from latentact.data.cache import DataConfig, open_store
from latentact.envs.spec import EXPERTS, Expert, env_spec, make_env, make_expert
from latentact.errors import UserError
from latentact.learners.contract import LEARNERS, LearnerTools, score
from latentact.learners.dagger import DaggerConfig
from latentact.learners.gail import GailConfig
from latentact.learners.ppo.discriminator import Discriminator, encode_steps, imitation_reward
from latentact.policies.bc import BcConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.selection import greedy
from latentact.policies.spec import PolicySpec, Target
from toy_env import FRAME, VECTOR, toy

LINE = "LearnerLine-v0"
CELLS = 20
STATE = BcConfig(network=NetworkConfig(backbone="state", hidden=(4,)))


class RightExpert(Expert):
    """Goes right and remembers what else was done."""

    taken: list[int] = []  # noqa: RUF012

    def act(self, explore=None):
        return 1

    def report_action(self, action):
        self.taken.append(action)


if LINE not in EXPERTS.names():
    EXPERTS.register(LINE)(lambda env, seed: RightExpert())


@pytest.fixture
def line():
    """A line of cells: action 1 goes right, 0 stays; the state is the cell; every step has reward 1."""

    def step(env, default):
        env.cell = min(env.cell + int(env.taken[-1]), CELLS - 1)
        return env.observe(), 1.0, False, False, {}

    def reset(env):
        env.cell = 0
        return env.observe(), {}

    RightExpert.taken.clear()
    return toy(
        LINE,
        observation=VECTOR,
        limit=8,
        step=step,
        reset=reset,
        observe=lambda env: np.array([getattr(env, "cell", 0) / CELLS, 0], np.float32),
        render=lambda env: FRAME,
    )


def stays(folder):
    """Write a policy that always stays."""
    spec = PolicySpec(
        resolution=16,
        state_size=2,
        target=Target(kind="classes", size=2),
        action_space=env_spec(LINE).action_space,
    )
    policy = STATE.build(spec)
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.tensor([1.0, 0.0]))
    policy.save_pretrained(folder)
    return folder


def tools(seed=0, trained=None):
    """Return tools whose training gives a policy that stays, and whose rollouts are made up."""
    result = {"success": None, "successes": None, "returns": [1.0, 2.0], "lengths": [8, 8], "episodes": 2}

    def train(data, folder, only="", episodes=None):
        if trained is not None:
            trained.append((json.loads((data / "meta/dagger.json").read_text())["labels"], only))
        return stays(folder)

    def rollout(policy, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rollout.json").write_text("{}")
        return result

    return LearnerTools(
        env=env_spec(LINE),
        view="agent",
        resolution=16,
        max_steps=0,
        policy=STATE,
        choose=greedy,
        data="",
        first_seed=100,
        seed=seed,
        expert=lambda folder: result,
        collect=lambda folder, episodes: folder,
        train=train,
        open=lambda data: open_store(DataConfig(path=str(data))),
        rollout=rollout,
    )


def rows_of(folder, tmp_path):
    store = open_store(DataConfig(path=str(folder), resolution=16, cache_dir=str(tmp_path / "cache")))
    columns = {name: store.column(name).ravel() for name in ("executed_action", "intervention", "labeled")}
    return store, np.ma.getdata(store.actions(range(store.num_episodes))), columns


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_learner_is_labeled_where_it_goes_and_never_twice(line, tmp_path):
    trained = []
    rows = DaggerConfig(labels=(3, 5), beta=0.5).learn(tools(trained=trained), tmp_path / "out")
    store, actions, columns = rows_of(tmp_path / "out/dagger/data", tmp_path)
    assert trained == [(3, "labeled"), (5, "labeled"), (5, "labeled")]
    assert columns["labeled"].sum() == 5
    cells = np.rint(store.state[:, 0] * CELLS).astype(int)
    assert sorted(cells[columns["labeled"]]) == [0, 1, 2, 3, 4]
    assert (actions == 1).all()  # the expert's, whatever was done
    first = store.episode == 0
    assert first.sum() == 4  # three labels, three steps, and the last observation
    assert columns["intervention"][first].tolist() == [True, True, True, False]
    assert [row["labels"] for row in rows] == [None, 3, 5, 3, 5]
    assert rows[1]["run"] == rows[3]["run"]  # the round in which the expert acts serves both


def test_an_unreachable_number_of_labels_is_said(line, tmp_path):
    """The learner stays in a cell that has its label: no episode adds one."""
    with pytest.raises(UserError, match=r"got 0 of 2 new labels before 100 episodes in a row"):
        DaggerConfig(labels=(1, 3), beta=0.0).learn(tools(), tmp_path)
    manifests = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("round.json"))
    assert manifests == ["dagger/round0/round.json"]


def test_beta_is_the_probability_of_the_experts_action(line, tmp_path):
    rows = DaggerConfig(labels=(2, 5, 7), beta=0.7, cap=0.0).learn(tools(), tmp_path / "out")
    own = [row for row in rows if row["method"] == "dagger"]
    assert [row["beta"] for row in own] == [1.0, 0.7, pytest.approx(0.49)]
    _, _, columns = rows_of(tmp_path / "out/dagger/data", tmp_path)
    later = columns["intervention"][3:]
    assert 0.3 < later.mean() < 0.9
    assert (columns["executed_action"][3:] == later)[
        :-1
    ].mean() > 0.9  # staying, where the expert did not act
    assert set(RightExpert.taken) == {0}  # the expert is told of actions that were not its own


def test_episodes_of_the_learner_are_short(line, tmp_path):
    DaggerConfig(labels=(2, 4), beta=0.7, cap=0.5).learn(tools(), tmp_path / "out")
    store, _, _ = rows_of(tmp_path / "out/dagger/data", tmp_path)
    assert store.lengths[1:].max() == 5  # half of the expert's 8 steps, and the last observation


@pytest.mark.parametrize("stage", [2, 5])
def test_an_interrupted_run_ends_with_the_same_bytes(line, tmp_path, monkeypatch, stage):
    from latentact.learners import dagger

    config, calls = DaggerConfig(labels=(2, 5), beta=0.6), []
    config.learn(tools(), tmp_path / "whole")

    def interrupted(name, original):
        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append(name)
            if len(calls) == stage:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(dagger, name, call)

    for name in ("stage_episode", "write_json", "write_dataset"):
        interrupted(name, getattr(dagger, name))
    with pytest.raises(KeyboardInterrupt):
        config.learn(tools(), tmp_path / "cut")
    config.learn(tools(), tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("hostile-was-here"),))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run, to copy."""
    return tmp_path_factory.mktemp("dagger") / "run"


@pytest.mark.parametrize("kind", ["another file", "replaced", "link", "lost", "manifest", "changed labels"])
def test_a_strange_file_in_a_round_is_refused(line, finished_run, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    config, out = DaggerConfig(labels=(2, 4), beta=0.6), tmp_path / "out"
    if not finished_run.exists():
        config.learn(tools(), finished_run)
    shutil.copytree(finished_run, out)
    place = out / "dagger/round0"
    episode = place / "0000000.npz"
    if kind == "another file":
        (place / "policy.pkl").write_bytes(pickle.dumps(Hostile()))
    elif kind == "replaced":
        np.savez(episode, action=np.array([Hostile()], object))
    elif kind == "link":
        shutil.move(episode, tmp_path / "moved.npz")
        episode.symlink_to(tmp_path / "moved.npz")
    elif kind == "lost":
        episode.unlink()
    elif kind == "manifest":
        (place / "round.json").write_bytes(pickle.dumps(Hostile()))
    else:
        np.save(place / "labeled.npy", np.array([Hostile()], object))
    with pytest.raises(UserError, match=r"round0"):
        config.learn(tools(), out)
    assert not Path("hostile-was-here").exists()


def test_labels_must_ascend():
    for labels in ((), (0, 5), (5, 5), (5, 3)):
        with pytest.raises(UserError, match=r"learner\.labels must be ascending"):
            DaggerConfig(labels=labels)


def row(method, returns, labels=None, **more):
    return {"method": method, "labels": labels, "successes": None, "returns": returns, **more}


def test_the_verdict_on_dagger_is_that_of_the_intervals():
    config = DaggerConfig(labels=(10, 20))
    same = [row(method, [0.0, 2.0] * 20, 10) for method in ("dagger", "bc")]
    good, bad, wide = [9.0, 11.0] * 20, [0.0, 2.0] * 20, [-30.0, 40.0] * 5
    say = lambda a, b: config.verdict([*same, row("dagger", a, 20), row("bc", b, 20)])  # noqa: E731
    assert say(good, bad).startswith("DAgger is better than behavior cloning: return 10 (")
    assert "better at 1 and worse at 0" in say(good, bad)
    assert say(bad, good).startswith("DAgger is worse than behavior cloning")
    assert say(wide, bad).startswith("DAgger is no better and no worse than behavior cloning")


def test_the_verdict_on_gail_names_what_the_control_says():
    config = GailConfig(demos=1)
    rows = [row("expert", [500.0] * 20), row("bc", [400.0] * 20), row("gail", [499.0, 500.0] * 10)]
    said = config.verdict([*rows, row("control", [200.0] * 20, demonstrated=9.3)])
    assert said.startswith("GAIL is better than behavior cloning: return 500 (")
    assert "reaches 200 (200 to 200), although that expert's return is 9.3" in said
    said = config.verdict([*rows, row("control", [500.0] * 20, demonstrated=9.3)])
    assert "does as well" in said
    said = config.verdict([*rows, row("control", [9.0] * 20, demonstrated=9.3)])
    assert "although" not in said
    said = GailConfig(control="shuffled").verdict([*rows, row("control", [9.0] * 20, demonstrated=None)])
    assert said.endswith("The control, GAIL on shuffled actions, reaches 9 (9 to 9).")
    assert GailConfig(control="silly") == GailConfig(control="constant")  # as run folders may have it


@pytest.mark.parametrize(
    ("probability", "gail", "airl", "neg"),
    [
        (0.5, math.log(2), 0.0, -math.log(2)),
        (0.75, math.log(4), math.log(3), math.log(0.75)),
        (0.2, math.log(1.25), -math.log(4), math.log(0.2)),
    ],
)
def test_rewards_from_the_probability_that_a_step_is_the_experts(probability, gail, airl, neg):
    logit = torch.tensor([math.log(probability / (1 - probability))])
    for kind, expected in (("gail", gail), ("airl", airl), ("neg", neg)):
        assert imitation_reward(logit, kind).item() == pytest.approx(expected, abs=1e-6)


def test_the_discriminator_says_expert_above_zero():
    torch.manual_seed(0)
    expert, own = torch.ones(64, 3), -torch.ones(64, 3)
    discriminator = Discriminator(3, (8,), lr=0.01, penalty=0.0)
    for _ in range(200):
        accuracy = discriminator.update(expert, own)
    assert accuracy == 1.0
    assert discriminator(expert[:1]).item() > 2
    assert discriminator(own[:1]).item() < -2
    smooth = Discriminator(3, (8,), lr=0.01, penalty=10.0)
    for _ in range(200):
        smooth.update(expert, own)
    assert smooth(expert[:1]).item() < discriminator(expert[:1]).item()


def test_a_fixed_horizon_repeats_the_last_observation():
    from latentact.learners.ppo.environment import PolicyEnv

    spec = env_spec("CartPole-v1")
    about = PolicySpec(
        resolution=16, state_size=4, target=Target(kind="classes", size=2), action_space=spec.action_space
    )
    policy = STATE.build(about)
    env = PolicyEnv(make_env("CartPole-v1", frames=False), policy, max_steps=0, seed=0, horizon=30)
    first, _ = env.reset()
    assert first.keys() == {"state"}
    assert np.abs(first["state"]).max() <= 0.05  # as CartPole starts
    seen = [env.step(0) for _ in range(30)]
    ends = [info["over"] for *_, info in seen]
    fell = ends.index(True)
    assert 7 < fell < 12
    assert ends == [False] * fell + [True] * (30 - fell)
    assert not any(terminated for _, _, terminated, _, _ in seen)
    assert [truncated for _, _, _, truncated, _ in seen] == [False] * 29 + [True]
    assert [reward for _, reward, *_ in seen] == [1.0] * fell + [0.0] * (30 - fell)
    assert seen[-1][-1]["return"] == fell
    assert np.array_equal(seen[fell][0]["state"], seen[-1][0]["state"])
    states = np.zeros((2, 4), np.float32)
    steps = encode_steps(states, np.array([1, 1]), np.array([False, True]), spec.action_space)
    assert steps.tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]


def test_experts_of_classic_control():
    for name, least in (("CartPole-v1", 500), ("Pendulum-v1", -450)):
        env = make_env(name, frames=False)
        for seed in range(1):
            observation, _ = env.reset(seed=seed)
            assert not observation["pixels"].any()
            expert, total, over = make_expert(name, env, seed), 0.0, False
            while not over:
                _, reward, terminated, truncated, _ = env.step(expert.act())
                total, over = total + reward, terminated or truncated
            assert total >= least


def test_every_learner_is_registered():
    assert {"dagger", "gail"} <= set(LEARNERS.names())
    assert score([{"successes": [1, 0], "returns": [3.0, 4.0]}]).mean == 0.5
    assert score([{"successes": None, "returns": [3.0, 4.0]}]).name == "return"


@pytest.mark.usefixtures("line")
def test_gail_refuses_what_it_cannot_learn(monkeypatch):
    pytest.importorskip("stable_baselines3")
    success = toy(
        "LearnerGoal-v0",
        observation=VECTOR,
        step=lambda env, default: (*default[:4], {"is_success": True}),
        render=lambda env: FRAME,
    )
    made = tools()
    object.__setattr__(made, "env", env_spec(success))
    with pytest.raises(UserError, match=r"learner\.horizon must be set .* end on success"):
        GailConfig().check(made)
    object.__setattr__(made, "policy", BcConfig())
    with pytest.raises(UserError, match=r"backbone=state"):
        GailConfig(horizon=10).check(made)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"latentact\[gail\]"):
        GailConfig().check(made)
    gymnasium.registry.pop(success)
