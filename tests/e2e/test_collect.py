"""Collecting demonstrations: what lands on disk, whatever happens on the way."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import contents
from latentact.envs import episode
from latentact.envs.spec import ExpertStuckError, make_env, make_expert
from latentact.errors import UserError
from latentact.stages import collect
from latentact.stages.collect import CollectConfig, run

ENV = "babyai/GoToRedBall"
EPISODES = 40

KILLED_WHILE_WRITING = """
import os, signal
from latentact.data.lerobot import writer
append = writer.Table.append
def cut(self, columns):
    if columns["episode_index"][0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return append(self, columns)
writer.Table.append = cut
"""


def config(out, **changes):
    return CollectConfig(**{"env": ENV, "out": str(out), "episodes": EPISODES, "workers": 1, **changes})


def start(settings, before=""):
    lines = [before, "from latentact.stages.collect import CollectConfig, run", f"run({settings!r})"]
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], start_new_session=True)


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "data"
    result = run(config(out))
    assert (result.episodes, result.failed, result.existed) == (EPISODES, 0, False)
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    return out


def test_dataset_holds_what_the_expert_did(undisturbed):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/data", root=undisturbed)
    assert dataset.num_episodes == EPISODES
    env, row = make_env(ENV), 0
    for seed in range(3):
        observation, info = env.reset(seed=seed)
        expert, ended = make_expert(ENV, env, seed), False
        while not ended:
            got, action = dataset[row], expert.act()
            pixels = (got["observation.images.agent"].permute(1, 2, 0) * 255).round().byte().numpy()
            assert (pixels == observation["pixels"]).all()
            assert np.array_equal(got["observation.state"].numpy(), observation["agent_pos"])
            assert got["action"].item() == action
            assert got["task"] == info["task"]
            observation, reward, ended, _, outcome = env.step(action)
            assert got["next.reward"].item() == pytest.approx(reward)
            assert got["next.success"].item() == outcome["is_success"]
            row += 1
        last = dataset[row]
        assert last["action"].item() == 6  # done: holds still
        assert np.array_equal(last["observation.state"].numpy(), observation["agent_pos"])
        assert last["episode_index"].item() == seed
        row += 1


def test_number_of_workers_changes_no_byte(undisturbed, tmp_path):
    run(config(tmp_path / "data", workers=2))
    assert contents(tmp_path / "data") == contents(undisturbed)


def test_killed_while_playing_goes_on(undisturbed, tmp_path):
    out = tmp_path / "data"
    partial = tmp_path / "data.partial"
    process = start(config(out, workers=2))
    deadline = time.monotonic() + 300
    while len(list(partial.glob("*.npz"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    while alive(process.pid):  # the workers follow shortly after
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(list(partial.glob("*.npz"))) >= 5
    run(config(out))
    assert contents(out) == contents(undisturbed)
    assert not partial.exists()


def test_killed_while_writing_goes_on(undisturbed, tmp_path):
    out = tmp_path / "data"
    process = start(config(out), KILLED_WHILE_WRITING)
    assert process.wait(timeout=300) == -signal.SIGKILL
    assert not out.exists()
    run(config(out))
    assert contents(out) == contents(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_finished_collection_is_left_alone(undisturbed):
    before = contents(undisturbed)
    result = run(config(undisturbed, workers=3))
    assert result.existed
    assert (result.episodes, result.failed) == (EPISODES, 0)
    assert contents(undisturbed) == before


@pytest.mark.parametrize("change", [{"episodes": 2}, {"seed": 1}, {"view": "full"}])
def test_other_settings_are_refused(undisturbed, change):
    with pytest.raises(UserError, match=rf"different settings \({next(iter(change))}\)"):
        run(config(undisturbed, **change))


def test_foreign_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="other files"):
        run(config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_unfinished_collection_with_other_settings_is_refused(tmp_path):
    out = tmp_path / "data"
    with collect.locked_staging(tmp_path / "data.partial", out, {"seed": 7}, "collection"):
        pass
    with pytest.raises(UserError, match="other settings"):
        run(config(out))


def test_two_processes_do_not_share_a_folder(tmp_path):
    out = tmp_path / "data"
    with (
        collect.locked_staging(tmp_path / "data.partial", out, {}, "collection"),
        pytest.raises(UserError, match="in use by another collection"),
    ):
        run(config(out))


@pytest.mark.parametrize("env", ["babyai/GoToRedBal", "MountainCar-v0", "NoSuch-v0"])
def test_bad_environment_leaves_nothing(env, tmp_path, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with pytest.raises(UserError):
        run(config(tmp_path / "data", env=env))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"episodes": 0}, {"seed": -1}, {"workers": -1}])
def test_bad_numbers_are_refused(change, tmp_path):
    with pytest.raises(UserError, match=next(iter(change))):
        config(tmp_path / "data", **change)


class Faulty:
    """The bot, but every third episode fails."""

    def __init__(self, name, env, seed):
        self.bot, self.seed = make_expert(name, env, seed), seed

    def act(self, explore=None):
        if self.seed % 3 == 1:
            raise ExpertStuckError
        return 0 if self.seed % 6 == 3 else self.bot.act(explore)


def test_failed_episodes_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(episode, "make_expert", Faulty)
    # Attempts 0 2 5 6 8 succeed, 1 3 4 7 fail: 3 turns in place until the time limit.
    result = run(config(tmp_path / "data", episodes=5))
    assert (result.episodes, result.failed) == (5, 4)
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/data", root=tmp_path / "data")
    env = make_env(ENV)
    for number, seed in enumerate([0, 2, 5, 6, 8]):
        first = dataset[dataset.meta.episodes[number]["dataset_from_index"]]
        observation, _ = env.reset(seed=seed)
        assert np.array_equal(first["observation.state"].numpy(), observation["agent_pos"])


def test_a_hopeless_expert_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="must solve at least 10 % of the attempts, got 0 of 20"):
        run(config(tmp_path / "data", max_steps=1, episodes=30, seed=2))


def test_pusht_is_stored_as_video(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    result = run(config(tmp_path / "data", env="pusht", episodes=2))
    dataset = LeRobotDataset("local/data", root=tmp_path / "data", video_backend="pyav")
    assert result.frames == len(dataset)
    env = make_env("pusht")
    observation, info = env.reset(seed=1)
    first = dataset[dataset.meta.episodes[1]["dataset_from_index"]]
    pixels = first["observation.images.top"].permute(1, 2, 0).numpy() * 255
    assert abs(pixels - observation["pixels"]).mean() < 4
    assert np.array_equal(first["observation.state"].numpy(), observation["agent_pos"])
    assert first["task"] == info["task"]
    last, before = dataset[-1 + len(dataset)], dataset[-2 + len(dataset)]
    assert np.array_equal(last["action"].numpy(), before["action"].numpy())
    assert last["next.success"].item()


def test_random_play_is_kept_whole(tmp_path):
    """In BabyAI, with the seven actions of the dataset; in an environment without an expert; continuous."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    result = run(config(tmp_path / "data", policy="random", episodes=30, max_steps=12, resolution=16))
    assert (result.episodes, result.failed) == (30, 0)
    columns = LeRobotDataset("local/data", root=tmp_path / "data").hf_dataset.with_format("numpy")
    episode, action, success = (columns[key][:] for key in ("episode_index", "action", "next.success"))
    assert np.bincount(episode).max() == 13
    assert not success.reshape(-1).all()
    steps = np.diff(episode, append=30) == 0  # the last action of an episode is a no-op
    counts = np.bincount(action.reshape(-1)[steps], minlength=7)
    assert counts.min() > 0.5 * counts.max()
    assert len({tuple(action[episode == number].reshape(-1)) for number in range(30)}) == 30
    others = {"policy": "random", "episodes": 4, "max_steps": 12, "resolution": 16}
    for name in ("Acrobot-v1", "pusht"):
        for workers in (1, 2):
            run(config(tmp_path / f"{name}{workers}", env=name, workers=workers, **others))
        assert contents(tmp_path / f"{name}1") == contents(tmp_path / f"{name}2")
    with pytest.raises(UserError, match=r"different settings \(action_repeat, policy\)"):
        run(config(tmp_path / "data", episodes=30, max_steps=12, resolution=16))
    with pytest.raises(UserError, match="explore must be 0 with policy=random"):
        config(tmp_path / "data", policy="random", explore=0.5)
    with pytest.raises(UserError, match="policy must be expert or random, got 'play'"):
        config(tmp_path / "data", policy="play")
