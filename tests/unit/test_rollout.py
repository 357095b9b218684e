import json
from dataclasses import replace

import av
import numpy as np
import pytest

from latentact.envs.distract import Distraction
from latentact.errors import UserError
from latentact.evaluation.policy.intervals import mean_interval, success_interval
from latentact.evaluation.policy.rollout import Rollout, rollout, save_rollout
from latentact.io.video_writer import write_video

ENV = "babyai/GoToRedBall"


class Wanderer:
    """Acts on the pixels and on the number of calls, so that it has a state to reset."""

    def __init__(self):
        self.resets = []

    def reset(self, num_envs):
        self.resets.append(num_envs)
        self.calls = 0

    def act(self, observation):
        pixels, tasks = observation["observation.images.agent"], observation["task"]
        assert pixels.dtype == np.uint8
        assert observation["observation.state"].shape == (len(pixels), 7)
        assert len(tasks) == len(pixels) == self.resets[-1]
        assert all("ball" in task for task in tasks)
        self.calls += 1
        return (pixels.reshape(len(pixels), -1).astype(np.int64).sum(1) // 7 + self.calls) % 3


def test_wilson_interval_by_hand():
    # 9 of 10, z = 1.959964: center (0.9 + 0.192073) / 1.384146, half-width 0.193134
    assert success_interval([True] * 9 + [False]) == pytest.approx((0.595850, 0.982124), abs=1e-6)
    assert success_interval([False] * 20) == pytest.approx((0.0, 0.161125), abs=1e-6)
    assert success_interval([True] * 20) == pytest.approx((0.838875, 1.0), abs=1e-6)
    assert success_interval([True]) == pytest.approx((0.206549, 1.0), abs=1e-6)


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = mean_interval(values, seed=1)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert mean_interval(values, seed=1) == (low, high)
    assert mean_interval([3.0, 3.0]) == (3.0, 3.0)


def test_number_of_environments_changes_nothing():
    results = [rollout(Wanderer(), ENV, episodes=7, seed=50, record=4, num_envs=n) for n in (1, 3, 64)]
    for other in results[1:]:
        assert (other.successes == results[0].successes).all()
        assert (other.returns == results[0].returns).all()
        assert (other.lengths == results[0].lengths).all()
        assert [len(v) for v in other.videos] == [len(v) for v in results[0].videos]
        assert all((a == b).all() for a, b in zip(other.videos, results[0].videos, strict=True))
    assert len(results[0].videos) == 4
    assert [len(v) for v in results[0].videos] == (results[0].lengths[:4] + 1).tolist()


def test_environments_are_shared_out_evenly():
    actor = Wanderer()
    rollout(actor, ENV, episodes=10, seed=0, max_steps=1, num_envs=4)
    assert actor.resets == [4, 3, 3]


def test_success_is_the_environments_own():
    from latentact.envs.spec import make_env, make_expert

    class Bot:
        """Plays what the scripted expert played from the same seeds."""

        def __init__(self, seeds):
            self.plans = []
            for seed in seeds:
                env = make_env(ENV)
                env.reset(seed=seed)
                expert, plan, ended = make_expert(ENV, env, seed), [], False
                while not ended:
                    plan.append(expert.act())
                    _, _, ended, _, _ = env.step(plan[-1])
                self.plans.append(plan)

        def reset(self, num_envs):
            self.step = -1

        def act(self, observation):
            self.step += 1
            return np.array([plan[min(self.step, len(plan) - 1)] for plan in self.plans])

    bot = Bot(range(30, 34))
    result = rollout(bot, ENV, episodes=4, seed=30)
    assert result.success == 1.0
    assert result.lengths.tolist() == [len(plan) for plan in bot.plans]
    assert (result.returns > 0.5).all()
    assert rollout(bot, ENV, episodes=4, seed=31).success < 1
    assert rollout(bot, ENV, episodes=4, seed=30, max_steps=1).lengths.tolist() == [1] * 4


def test_an_environment_that_cannot_tell_has_no_success(monkeypatch, tmp_path):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")

    class Right:
        def reset(self, num_envs):
            pass

        def act(self, observation):
            return np.ones(len(observation["task"]), np.int64)

    result = rollout(Right(), "CartPole-v1", episodes=2, seed=0, resolution=32)
    assert result.successes is None
    assert result.success is None
    assert (result.returns == result.lengths).all()
    save_rollout(result, tmp_path)
    saved = json.loads((tmp_path / "rollout.json").read_text())
    assert saved["success"] is saved["ci95"] is saved["successes"] is None


def test_no_episode_is_a_user_error():
    with pytest.raises(UserError, match="episodes must be between 1 and 1000000, got 0"):
        rollout(Wanderer(), ENV, episodes=0, seed=0)


@pytest.mark.parametrize(
    ("shape", "size"), [((56, 56), (224, 224)), ((96, 64), (288, 192)), ((301, 225), (300, 224))]
)
def test_video_is_large_enough_and_plays(tmp_path, shape, size):
    frames = np.zeros((6, *shape, 3), np.uint8)
    frames[3:] = 200
    write_video(tmp_path / "a.mp4", frames, 10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == size
        assert stream.average_rate == 10
        decoded = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(stream)]
    assert decoded == pytest.approx([0] * 3 + [200] * 3, abs=4)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_saved_rollout_replaces_an_older_one(tmp_path):
    def result(videos):
        return Rollout(
            env=ENV,
            seed=3,
            fps=10,
            successes=np.array([True, False]),
            returns=np.array([0.5, 0.0]),
            max_rewards=np.array([0.5, 0.0]),
            lengths=np.array([4, 64]),
            videos=[np.zeros((2, 56, 56, 3), np.uint8)] * videos,
        )

    save_rollout(result(2), tmp_path / "r")
    save_rollout(result(1), tmp_path / "r", policy="bc")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["episode_000.mp4", "rollout.json"]
    saved = json.loads((tmp_path / "r" / "rollout.json").read_text())
    assert saved["successes"] == [1, 0]
    assert saved["returns"] == [0.5, 0.0]
    assert (saved["success"], saved["return"], saved["episodes"], saved["policy"]) == (0.5, 0.25, 2, "bc")
    assert saved["ci95"] == pytest.approx(success_interval([True, False]))


def test_a_rollout_has_the_keys_of_lerobot_eval(tmp_path):
    """`per_episode` and `aggregated` as in `eval_info.json` of lerobot-eval."""

    class Still:
        def reset(self, num_envs):
            pass

        def act(self, observation):
            return np.zeros(len(observation["task"]), np.int64)

    result = rollout(Still(), ENV, episodes=3, seed=9, max_steps=4)
    result = replace(
        result,
        successes=np.array([True, False, False]),
        returns=np.array([1.5, 0.0, 0.0]),
        max_rewards=np.array([0.75, 0.0, 0.0]),
    )
    save_rollout(result, tmp_path)
    saved = json.loads((tmp_path / "rollout.json").read_text())
    assert saved["per_episode"] == [
        {"episode_ix": 0, "sum_reward": 1.5, "max_reward": 0.75, "success": True, "seed": 9},
        {"episode_ix": 1, "sum_reward": 0.0, "max_reward": 0.0, "success": False, "seed": 10},
        {"episode_ix": 2, "sum_reward": 0.0, "max_reward": 0.0, "success": False, "seed": 11},
    ]
    assert saved["aggregated"] == {
        "avg_sum_reward": 0.5,
        "avg_max_reward": 0.25,
        "pc_success": pytest.approx(100 / 3),
        "eval_s": pytest.approx(3 * saved["aggregated"]["eval_ep_s"]),
        "eval_ep_s": saved["aggregated"]["eval_ep_s"],
    }
    assert saved["aggregated"]["eval_s"] > 0


def test_distractors_change_the_frames():
    plain, distracted = (
        rollout(Wanderer(), ENV, episodes=1, seed=3, max_steps=2, record=1, distract=distract).videos[0]
        for distract in (None, Distraction(background=1.0))
    )
    assert plain.shape == distracted.shape
    assert not np.array_equal(plain[0], distracted[0])
