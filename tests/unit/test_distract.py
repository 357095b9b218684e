import json

import numpy as np
import pytest

from conftest import cli
from latentact.data.cache import DataConfig, open_store
from latentact.envs.distract import DRIFT, SHAKE, Distraction, Distractor
from latentact.envs.spec import make_env, make_expert
from latentact.errors import UserError
from latentact.stages.collect import CollectConfig, run

ALL = Distraction(background=0.6, shake=0.5, correlation=0.8)


def played(name, distraction, steps=25, seed=3):
    env = make_env(name, distract=distraction)
    observation, info = env.reset(seed=seed)
    expert = make_expert(name, env, seed)
    frames, nuisances = [observation["pixels"]], [info.get("nuisance")]
    for _ in range(steps):
        observation, _, ended, _, info = env.step(expert.act())
        frames.append(observation["pixels"])
        nuisances.append(info.get("nuisance"))
        if ended:
            break
    return np.stack(frames), nuisances


def played_blindly(name, distraction, actions):
    env = make_env(name, distract=distraction)
    observation, info = env.reset(seed=0)
    frames, nuisances = [observation["pixels"]], [info["nuisance"]]
    for action in actions:
        observation, _, _, _, info = env.step(action)
        frames.append(observation["pixels"])
        nuisances.append(info["nuisance"])
    return frames, np.array(nuisances)


def test_parse():
    assert Distraction.parse("") == Distraction()
    assert not Distraction(correlation=1.0)
    assert Distraction.parse("background=0.6, shake=0.5,correlation=0.8") == ALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backgroud=1", "did you mean 'background'"),
        ("shake=0.1,shake=0.2", "must be given once"),
        ("correlation=0.8", "must include background, shake or appearance"),
        ("shake=much", "shake must be between 0 and 1, got 'much'"),
        ("shake=2", "shake must be between 0 and 1, got 2"),
        ("correlation=nan", "correlation must be between 0 and 1, got nan"),
    ],
)
def test_invalid_distractors_are_user_errors(text, message):
    with pytest.raises(UserError, match=message):
        Distraction.parse(text)


def test_at_correlation_one_the_action_decides_both_motions():
    distractor = Distractor(Distraction(background=1.0, shake=1.0, correlation=1.0), seed=0)
    distractor.step(np.array([1.0, 0.0]))
    assert distractor.nuisance == pytest.approx([DRIFT, 0, SHAKE, 0])
    distractor.step(np.array([0.5, -1.0]))
    assert distractor.nuisance == pytest.approx([1.5 * DRIFT, -DRIFT, 0.5 * SHAKE, -SHAKE])


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_the_correlation_is_what_was_asked_for(correlation):
    distractor = Distractor(Distraction(background=1.0, shake=0.3, correlation=correlation), seed=0)
    headings = np.random.default_rng(1).normal(size=(4000, 2)).clip(-3, 3)
    states = [distractor.nuisance]
    for heading in headings:
        distractor.step(heading)
        states.append(distractor.nuisance)
    drift, shake = np.diff([s[:2] for s in states], axis=0), np.array(states)[1:, 2:]
    for motion in (drift, shake):
        for axis in (0, 1):
            found = np.corrcoef(motion[:, axis], headings[:, axis])[0, 1]
            assert found == pytest.approx(correlation, abs=0.06)
    assert drift.std() == pytest.approx(DRIFT, rel=0.1)


def test_the_camera_moves_the_whole_picture_and_repeats_its_edge():
    distractor = Distractor(Distraction(shake=1.0, correlation=1.0), seed=0)
    frame = np.arange(100, dtype=np.uint8).reshape(10, 10, 1).repeat(3, 2)
    distractor.step(np.array([1.7, 0.0]))  # 0.102 of 10 pixels: one to the right
    seen = distractor.draw(frame, None)
    assert (seen[:, 1:] == frame[:, :-1]).all()
    assert (seen[:, 0] == frame[:, 0]).all()


@pytest.mark.parametrize("name", ["babyai/GoToRedBall", "pusht"])
def test_what_lies_on_the_floor_stays_in_sight(name):
    plain, nothing = played(name, None)
    frames, nuisances = played(name, Distraction(background=1.0, correlation=0.5))
    assert nothing == [None] * len(plain)
    assert len(plain) == len(frames)
    changed = (plain != frames).any(-1)
    assert 0.3 < changed.mean() < 1
    if name == "pusht":
        things = plain.min(-1) < 200
    else:
        things = (plain != plain[..., :1]).any(-1) | (plain[..., 0] >= 100)
    assert things.any((1, 2)).all()
    assert not changed[things].any()
    assert (np.diff(np.stack(nuisances), axis=0)[:, :2] != 0).any(1).all()
    still = ~things[0] & ~things[1] & (plain[0] == plain[1]).all(-1)
    assert (frames[0] != frames[1]).any(-1)[still].mean() > 0.3


@pytest.mark.parametrize("name", ["babyai/GoToRedBall", "pusht"])
def test_the_seed_decides_everything(name):
    frames, nuisances = played(name, ALL, 6)
    again, same = played(name, ALL, 6)
    assert (frames == again).all()
    assert np.array_equal(nuisances, same)
    other, _ = played(name, ALL, 6, seed=4)
    assert (frames[0] != other[0]).any()


def test_the_camera_of_any_environment_can_shake():
    frames, nuisances = played_blindly("CartPole-v1", Distraction(shake=1.0, correlation=1.0), [0, 1])
    assert nuisances == pytest.approx(
        np.array([[0, 0, 0, 0], [0, 0, 0.08, 0], [0, 0, -0.08, 0]])
    )  # its limit
    assert (frames[1] != frames[2]).any()
    _, nuisances = played_blindly("Pendulum-v1", Distraction(shake=1.0, correlation=1.0), [[1.0]])
    assert nuisances[1] == pytest.approx([0, 0, 0.5 * SHAKE, 0])  # half of the largest torque


def test_a_background_needs_to_be_known():
    with pytest.raises(
        UserError, match=r"CartPole-v1 must have a background mask .* Use shake or appearance"
    ):
        make_env("CartPole-v1", distract=ALL)


def test_a_dataset_records_the_nuisance(tmp_path):
    done = cli(
        *("collect", "babyai/GoToRedBall", "--episodes", "3", "--workers", "1", "--out", tmp_path / "data"),
        *("--distract", "background=0.6,shake=0.5,correlation=0.8"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "data/meta/collect.json").read_text())["distract"] == ALL.settings
    store = open_store(DataConfig(path=str(tmp_path / "data"), resolution=56))
    frames, nuisances = played("babyai/GoToRedBall", ALL, 200, seed=0)
    recorded = store.column("observation.nuisance")
    assert recorded is not None
    assert np.array_equal(recorded[: len(frames)], nuisances)
    assert (store.frames[: len(frames)] == frames).all()
    config = CollectConfig(env="babyai/GoToRedBall", out=str(tmp_path / "data"), episodes=3)
    with pytest.raises(UserError, match=r"different settings \(distract\)"):
        run(config)
