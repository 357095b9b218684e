"""Any Gymnasium environment through the real commands: names, limits, frames, cameras, actions, failures."""

import json
import os
import re
import sys

import numpy as np
import pytest
from gymnasium.spaces import Dict, Discrete, MultiDiscrete, Tuple
from PIL import Image

from conftest import cli, refused, write_blocks
from latentact.guidance.guide import Guide
from latentact.policies.contract import Policy
from latentact.policies.decoder import DecoderConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, Target
from latentact.stages import collect as collecting
from latentact.stages import rollout as rolling
from latentact.types import ActionSpace, LatentActionSpec
from toy_env import FRAME, IMAGE, VECTOR, Toy, constant_policy, toy


def rollout(policy, env, out, *more):
    done = cli("rollout", "--policy", policy, "--env", env, "--out", out, *map(str, more))
    assert done.returncode == 0, done.stderr
    return json.loads((out / "rollout.json").read_text())


def refuse_rollout(policy, env, out, *more):
    return refused("rollout", "--policy", policy, "--env", env, "--out", out, *map(str, more))


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A policy that always takes class 1 of two."""
    return constant_policy(tmp_path_factory.mktemp("right") / "policy", 1)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """A policy that always outputs (3, -0.5)."""
    return constant_policy(tmp_path_factory.mktemp("far") / "policy", [3.0, -0.5])


# --- success


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1", "toy"])
def test_an_environment_without_success_reports_its_return(right, tmp_path, env):
    name = toy("ToyEdge-v0") if env == "toy" else env
    actions = ActionSpace(kind="discrete", size=3)
    policy = constant_policy(tmp_path / "p", 1, actions) if env == "Acrobot-v1" else right
    found = rollout(policy, name, tmp_path / "out", "--episodes", 2, "--max-steps", 20)
    assert found["success"] is found["ci95"] is found["successes"] is None
    assert found["return"] == np.mean(found["returns"])
    assert found["return"] == {"toy": 5, "Acrobot-v1": -20}.get(env, found["return"])


@pytest.mark.parametrize(
    ("infos", "successes"),
    [
        ([{}, {"is_success": np.bool_(True)}, {"is_success": False}], [1]),
        ([{"success": 0.0}] * 3, [0]),
        ([{}, {}, {"final_info": {"success": np.array([1.0])}}], [1]),
    ],
)
def test_success_at_some_step_is_success(right, tmp_path, infos, successes):
    name = toy("ToyEdge-v0", limit=3, step=lambda env, default: (*default[:4], infos[env.steps - 1]))
    assert rollout(right, name, tmp_path / "out", "--episodes", 1)["successes"] == successes


def test_success_that_some_episodes_never_report_is_none_of_theirs(right, tmp_path):
    def step(env, default):
        return (*default[:4], {"success": True} if env.seed == 8 else {})

    name = toy("ToyEdge-v0", limit=3, step=step)
    assert rollout(right, name, tmp_path / "out", "--episodes", 3, "--seed", 7)["successes"] == [0, 1, 0]


def test_an_episode_may_end_at_its_first_step(right, tmp_path):
    quirks = (np.array([0.5]), np.bool_(True), np.array([False]), None)
    name = toy("ToyEdge-v0", step=lambda env, default: (default[0], *quirks))
    found = rollout(right, name, tmp_path / "out", "--episodes", 3)
    assert (found["lengths"], found["returns"]) == ([1, 1, 1], [0.5, 0.5, 0.5])


# --- names and limits


def test_environments_of_other_packages(right, tmp_path, monkeypatch):
    for package, name in (("edgepack", "edgepack/Toy-v0"), ("edgepack2", "edgepack2:edgepack2/Toy-v0")):
        (tmp_path / package).mkdir()
        code = f"from toy_env import toy\ntoy('{package}/Toy-v0')\n"
        (tmp_path / package / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        assert rollout(right, name, tmp_path / f"out_{package}", "--episodes", 1)["returns"] == [5]
    assert "unknown environment 'edgepack3/Toy-v0'" in refuse_rollout(
        right, "edgepack3/Toy-v0", tmp_path / "no"
    )


def test_an_environment_without_a_limit_needs_one(right, tmp_path):
    name = toy("ToyEdge-v0", limit=None)
    out = tmp_path / "out"
    assert "ToyEdge-v0 must have a time limit" in refuse_rollout(right, name, out)
    assert not out.exists()
    assert rollout(right, name, out, "--episodes", 2, "--max-steps", 7)["lengths"] == [7, 7]


def test_compare_checks_the_environment_before_it_trains(tmp_path):
    data = write_blocks(tmp_path / "blocks.npz")
    given = (f"data.path={data}", "data.resolution=32", "ks=[1]", f"out={tmp_path / 'out'}")
    for env, message in (
        (toy("ToyEndless-v0", action=Discrete(4), limit=None), "must have a time limit"),
        (toy("ToyFive-v0", action=Discrete(5)), "one of 4 discrete actions (0 to 3), but ToyFive-v0"),
        (
            toy("ToyFrom1-v0", action=Discrete(4, start=1)),
            "ToyFrom1-v0 expects one of 4 discrete actions (1 to",
        ),
        (toy("ToyBox-v0", action=VECTOR), "ToyBox-v0 expects a 2-D continuous action"),
        (toy("ToyMulti-v0", action=MultiDiscrete([2, 2])), "must be a Discrete or a one-dimensional Box"),
    ):
        assert message in refused("compare", *given, f"env={env}")
    for setting in ("episodes=0", "max_steps=-1", "record=-1", "eval_seed=-1", "seeds=[-1]"):
        assert "must be between" in refused("compare", *given, "env=ToyEndless-v0", setting)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--episodes", "0"), ("--episodes", "-3"), ("--episodes", str(10**12))),
        *(("--max-steps", "-1"), ("--max-steps", str(10**20))),
        *(("--record", "-1"), ("--record", str(10**12))),
        *(("--seed", "-1"), ("--seed", str(10**30))),
    ],
)
def test_numbers_out_of_range(right, tmp_path, flag, value):
    assert "must be between" in refuse_rollout(right, toy("ToyEdge-v0"), tmp_path / "out", flag, value)
    if flag != "--record":
        given = ("collect", "babyai/GoToLocal", "--out", tmp_path / "out", flag, value)
        assert "must be between" in refused(*given)
    if flag in ("--max-steps", "--seed"):
        given = ("--latents-path", tmp_path, "--policy-path", right, "--output-dir", tmp_path / "out")
        refused("imitate", *given, flag, value)
    assert not (tmp_path / "out").exists()


# --- frames and cameras


@pytest.mark.parametrize(
    "value",
    [FRAME / 255, [FRAME], FRAME[..., 0], np.dstack([FRAME, FRAME[..., :1]]), FRAME.transpose(2, 0, 1)],
)
def test_the_video_shows_what_was_rendered(right, tmp_path, value):
    import av

    name = toy("ToyEdge-v0", observation=VECTOR, render=lambda _: value)
    rollout(right, name, tmp_path / "out", "--episodes", 1)
    with av.open(str(tmp_path / "out/episode_000.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 6
    assert np.mean(frames) == pytest.approx(200, abs=3)


@pytest.mark.parametrize(
    ("value", "got"), [(None, "None"), ("ansi", "a str"), (np.zeros((9, 9, 2)), "ndarray of")]
)
def test_render_without_a_frame_is_one_sentence(right, tmp_path, value, got):
    name = toy("ToyEdge-v0", observation=VECTOR, render=lambda _: value)
    message = refuse_rollout(right, name, tmp_path / "out")
    assert (
        f"render() of ToyEdge-v0 must return an image (gray, RGB or RGBA, channels first or last), got {got}"
        in (message)
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("camera", ["observation.image", "observation.images.front", ""])
def test_one_camera_on_both_sides(tmp_path, camera):
    policy = constant_policy(tmp_path / "policy", [250.0, 250.0], camera=camera)
    for view in ("agent", "full"):
        given = ("--view", view, "--episodes", 1, "--max-steps", 2)
        assert rollout(policy, "pusht", tmp_path / view, *given)["lengths"] == [2]


def test_a_camera_of_the_other_view_names_that_view(tmp_path):
    level = ActionSpace(kind="discrete", size=7)
    policy = constant_policy(tmp_path / "policy", 2, level, camera="observation.images.full")
    message = refuse_rollout(policy, "babyai/GoToLocal", tmp_path / "out")
    remedy = re.search(r"Use (--view \w+)", message)
    assert remedy
    more = (*remedy[1].split(), "--episodes", 1, "--max-steps", 2)
    assert rollout(policy, "babyai/GoToLocal", tmp_path / "out", *more)["lengths"] == [2]


def test_several_images_and_the_remedy(right, tmp_path):
    two = toy("ToyEdge-v0", observation=Dict(top=IMAGE, wrist=IMAGE))
    assert "names the one to use 'pixels'" in refuse_rollout(right, two, tmp_path / "out")
    space = Dict(pixels=IMAGE, wrist=IMAGE)
    mended = toy("ToyEdge-v0", observation=space, observe=lambda _: {"pixels": FRAME, "wrist": FRAME})
    assert rollout(right, mended, tmp_path / "out", "--episodes", 1)["lengths"] == [5]


def test_a_state_of_another_size_is_refused_first(tmp_path):
    policy = constant_policy(tmp_path / "policy", 1, state_size=3)
    message = refuse_rollout(policy, toy("ToyEdge-v0"), tmp_path / "out")
    assert "needs a robot state of 3 dimensions, but ToyEdge-v0 has 0" in message


# --- actions


def test_continuous_actions_are_clipped(far, tmp_path):
    found = rollout(far, toy("ToyEdge-v0", action=VECTOR, limit=2), tmp_path / "out", "--episodes", 1)
    assert found["lengths"] == [2]
    np.testing.assert_array_equal(Toy.taken, [[1, -0.5]] * 2)


@pytest.mark.parametrize("weight", [3e38, -3e38])
@pytest.mark.parametrize("action", [1, [0.0, 0.0]])
def test_actions_that_are_not_finite_are_refused(tmp_path, action, weight):
    policy = Policy.from_pretrained(constant_policy(tmp_path / "finite", action))
    policy.head.weight.data.fill_(weight)  # the outputs overflow
    policy.save_pretrained(tmp_path / "policy")
    name = toy("ToyEdge-v0", action=None if action == 1 else VECTOR)
    message = refuse_rollout(tmp_path / "policy", name, tmp_path / "out")
    assert "the actions of the policy must be finite" in message
    assert Toy.taken == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "start", "chosen", "taken"),
    [((1, 2, 3), 1, 2, 3), ((-1, 0), -1, 0, -1), ((5, 7), 5, 1, 7), ((0, 2), 0, 1, 2)],
)
def test_a_class_stands_for_its_value(tmp_path, values, start, chosen, taken):
    space = ActionSpace(kind="discrete", size=len(values), values=values)
    policy = constant_policy(tmp_path / "policy", chosen, space)
    rollout(policy, toy("ToyEdge-v0", action=Discrete(3, start=start)), tmp_path / "out", "--episodes", 1)
    assert set(Toy.taken) == {taken}


@pytest.mark.parametrize(
    ("space", "action", "message"),
    [
        (ActionSpace(kind="discrete", size=2), Discrete(3), "one of 2 discrete actions (0 to 1), but"),
        (
            ActionSpace(kind="discrete", size=3),
            Discrete(3, start=1),
            "expects one of 3 discrete actions (1 to 3)",
        ),
        (ActionSpace(kind="discrete", size=2, values=(3, 4)), Discrete(3, start=1), "(3 to 4), but"),
        (ActionSpace(kind="discrete", size=2), VECTOR, "expects a 2-D continuous action"),
        (ActionSpace(kind="discrete", size=2), Dict(a=VECTOR), "must be a Discrete or a one-dimensional Box"),
    ],
)
def test_actions_of_another_kind_are_refused(tmp_path, space, action, message):
    policy = constant_policy(tmp_path / "policy", 0, space)
    assert message in refuse_rollout(policy, toy("ToyEdge-v0", action=action), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- failures


def fails_at(step, seed):
    def part(env, default):
        if env.seed == seed and env.steps == step:
            raise RuntimeError("the gripper is jammed")
        return default

    return part


def test_the_episodes_before_a_failure_are_kept(right, tmp_path):
    name, out = toy("ToyEdge-v0", step=fails_at(3, seed=12)), tmp_path / "out"
    given = ("--episodes", "5", "--seed", "10")
    message = refuse_rollout(right, name, out, *given)
    assert (
        "ToyEdge-v0 failed at step 3 of the episode with reset seed 12: RuntimeError: the gripper is"
        in message
    )
    assert f"The episodes before it (2) are in {out / 'partial.json'}." in message
    partial = json.loads((out / "partial.json").read_text())
    assert (partial["lengths"], partial["returns"], partial["episodes"]) == ([5, 5], [5, 5], 2)
    assert "the gripper is jammed" in partial["error"]
    files = {path.name for path in out.iterdir()}
    assert files == {"partial.json", "episode_000.mp4", "episode_001.mp4"}
    toy(name)
    assert rollout(right, name, out, *given)["lengths"] == [5] * 5
    assert {path.name for path in out.iterdir()} == {
        *("rollout.json", "episode_000.mp4", "episode_001.mp4", "episode_002.mp4"),
    }


def test_a_failure_of_the_first_episode_leaves_nothing(right, tmp_path):
    def reset(env):
        if env.seed == 10:
            raise OSError("no display")
        return env.observe(), {}

    for parts, message in (
        ({"step": fails_at(1, 10)}, "failed at step 1 of the episode with reset seed 10: RuntimeError"),
        ({"reset": reset}, "ToyEdge-v0 failed at reset with seed 10: OSError: no display"),
        ({"step": lambda *_: sys.exit()}, "failed at step 1 of the episode with reset seed 10: SystemExit."),
        (
            {"step": lambda _, default: (default[0], np.nan, *default[2:])},
            "a finite reward, got nan at step 1",
        ),
    ):
        assert message in refuse_rollout(right, toy("ToyEdge-v0", **parts), tmp_path / "out", "--seed", "10")
    assert not (tmp_path / "out").exists()


def test_attempts_before_a_failure_are_collected_when_it_is_gone(tmp_path, monkeypatch):
    make, broken = collecting.make_env, [True]

    def failing(*names, **settings):
        env = make(*names, **settings)
        inner, step = env.unwrapped, env.unwrapped.step

        def fail(action):
            if broken[0] and len(list(tmp_path.glob("d.partial/*.npz"))) == 2:
                raise RuntimeError("out of memory")
            return step(action)

        inner.step = fail
        return env

    monkeypatch.setattr(collecting, "make_env", failing)
    collecting._environment.cache_clear()
    given = (
        "collect",
        "babyai/GoToRedBallNoDists",
        "--out",
        tmp_path / "d",
        "--episodes",
        "3",
        "--workers",
        "1",
    )
    message = refused(*given)
    assert "babyai/GoToRedBallNoDists failed at step 1 of the episode with reset seed" in message
    assert "RuntimeError: out of memory" in message
    assert f"The attempts so far are kept in {tmp_path / 'd.partial'}" in message
    kept = {path.name: path.read_bytes() for path in (tmp_path / "d.partial").glob("*.npz")}
    assert len(kept) == 2
    broken[0] = False
    assert cli(*given).returncode == 0
    assert (tmp_path / "d/meta/info.json").exists()
    collecting._environment.cache_clear()


# --- imitate


SPEC = LatentActionSpec(
    model="lapo",
    tokens=1,
    token_dim=4,
    codebook_size=None,
    frame_gap=1,
    frame_gap_s=0.1,
    fps=10.0,
    resolution=32,
    camera="observation.images.top",
)


def follower(root, space, camera="observation.image"):
    """Write a grounded latent policy and a guide of 8 latent actions; return the arguments for `imitate`."""
    network = NetworkConfig(backbone="patch", patch=8, channels=(8,))
    about = PolicySpec(resolution=32, target=Target(kind="continuous", size=4), fps=10.0, camera=camera)
    latent = LatentConfig(network=network).build(about, SPEC)
    latent.ground(DecoderConfig(), space).save_pretrained(root / "policy")
    vectors = np.random.default_rng(0).normal(size=(8, 1, 4)).astype(np.float32)
    guide = Guide(spec=SPEC, fps=10.0, vectors=vectors, continuous=vectors, codes=None)
    (root / "guide").mkdir()
    guide.save(root / "guide")
    return ("imitate", "--latents-path", root / "guide", "--policy-path", root / "policy", "--fps", "10")


def test_imitate_acts_by_the_same_rules(tmp_path):
    space = ActionSpace(kind="discrete", size=2, values=(1, 3))
    given, out = follower(tmp_path, space), tmp_path / "out"

    def imitate(env, *more):
        return (*given, "--env-name", env, "--output-dir", out, "--no-save-video", *more)

    name = toy("ToyEdge-v0", action=Discrete(3, start=1), limit=None)
    assert cli(*imitate(name)).returncode == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["return"], metrics["success"]) == (8, 8, None)
    assert set(Toy.taken) <= {1, 3}
    name = toy("ToyEdge-v0", action=Discrete(3, start=1), step=fails_at(4, seed=0))
    assert "ToyEdge-v0 failed at step 4 of the episode with reset seed 0: RuntimeError" in refused(
        *imitate(name)
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["return"]) == (3, 3)
    assert "the gripper is jammed" in metrics["ended"]
    assert metrics["end"] == "error"
    assert (out / "report.html").exists()
    for env in (toy("ToyEdge-v0"), toy("ToyEdge-v0", action=VECTOR)):
        assert "but ToyEdge-v0 expects" in refused(*imitate(env))
    file, name = tmp_path / "file", toy("ToyEdge-v0", action=Discrete(3, start=1))
    file.write_text("")
    assert "--output-dir must be a folder, got the file" in refused(*imitate(name), "--output-dir", file)
    assert "--out must be a folder, got the file" in refuse_rollout(tmp_path / "policy", name, file)
    assert not Toy.taken


FAILING = {
    "reset": ({"reset": lambda env: 1 / 0}, "failed at reset: ZeroDivisionError"),
    "step": ({"step": lambda env, default: default[:4]}, "failed at step 1 of the episode with reset seed"),
    "render": ({"observation": VECTOR, "render": lambda env: None}, "must return an image"),
    "reward": ({"step": lambda env, default: (default[0], None, *default[2:])}, "failed at step 1"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_compare_tries_the_environment_before_it_trains(tmp_path, kind):
    data = write_blocks(tmp_path / "blocks.npz")
    parts, message = FAILING[kind]
    name = toy("ToyFails-v0", action=Discrete(4), **parts)
    given = (f"data.path={data}", "data.resolution=32", "ks=[1]", f"out={tmp_path / 'out'}", f"env={name}")
    assert message in refused("compare", *given)
    given = (*given[:-1], f"env={toy('ToyPlain-v0', action=Discrete(4))}", "distract=background=0.3")
    assert "ToyPlain-v0 must have a background mask" in refused("compare", *given)
    assert not (tmp_path / "out").exists()


TINY_COMPARE = (
    *("ks=[1]", "methods=[bc_k]", "held_out=0.2", "policy_training.steps=2", "finetune_steps=0", "record=1"),
    *("policy.network.backbone=patch", "policy.network.patch=8", "policy.network.channels=[8]", "episodes=2"),
)
PLAYED = {
    "image of any name": {"observation": Dict({"a cam/1": IMAGE}), "observe": lambda env: {"a cam/1": FRAME}},
    "tuple": {
        "observation": Tuple((VECTOR, IMAGE)),
        "observe": lambda env: (0, 1),
        "render": lambda env: FRAME,
    },
    "no space": {"observation": None, "observe": lambda env: None, "render": lambda env: [FRAME, FRAME]},
    "arrays": {"step": lambda env, default: (default[0], np.array([1.0]), np.array([False]), 0, None)},
    "close": {"close": lambda env: 1 / 0},
    "other package": {"package": "edgecompare"},
}


@pytest.mark.parametrize("kind", PLAYED)
def test_compare_and_imitate_play_odd_environments(tmp_path, monkeypatch, kind):
    parts = dict(PLAYED[kind])
    package = parts.pop("package", "")
    name = f"{package}:{package}/Odd-v0" if package else toy("ToyOdd-v0", action=Discrete(4), **parts)
    if package:
        (tmp_path / package).mkdir()
        code = f"from gymnasium.spaces import Discrete\nfrom toy_env import toy\ntoy('{package}/Odd-v0', "
        (tmp_path / package / "__init__.py").write_text(f"{code}action=Discrete(4))\n")
        monkeypatch.syspath_prepend(tmp_path)
    data = write_blocks(tmp_path / "blocks.npz", episodes=4)
    out, given = tmp_path / "compare", (f"data.path={data}", "data.resolution=32", f"env={name}")
    done = cli("compare", *given, *TINY_COMPARE, f"out={out}")
    assert done.returncode == 0, done.stderr
    row, *blind = json.loads((out / "comparison.json").read_text())["rows"]
    assert [other["method"] for other in blind] == ["uniform", "frequencies"]
    assert (row["success"], row["return"]) == (None, 5)
    space = ActionSpace(kind="discrete", size=4)
    done = cli(*follower(tmp_path, space), "--env-name", name, "--output-dir", tmp_path / "imitate")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "imitate/metrics.json").read_text())
    assert (metrics["steps"], metrics["return"], metrics["success"]) == (5, 5, None)


@pytest.mark.parametrize("part", ["reset", "step", "render", "close"])
def test_an_environment_that_changes_the_working_directory(right, tmp_path, monkeypatch, part):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)

    def leave(env, *default):
        os.chdir(elsewhere)
        return {"reset": (np.zeros(2), {}), "render": FRAME}.get(part, *default)

    name = toy("ToyLeaves-v0", **{"observation": VECTOR, "render": lambda env: FRAME, part: leave})
    done = cli("rollout", "--policy", right, "--env", name, "--out", "out", "--episodes", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/rollout.json").exists()
    assert not any(elsewhere.iterdir())


def test_a_16_bit_picture_of_pillow_is_not_white(right, tmp_path):
    deep = Image.fromarray(np.full((32, 32), 40_000, np.uint16))
    name = toy("ToyDeep-v0", observation=VECTOR, render=lambda env: deep)
    assert "must return values from 0 to 255" in refuse_rollout(right, name, tmp_path / "out")


def test_a_summary_has_success_and_return():
    result = {"return": 3.0, "return_ci95": [2.0, 4.0], "success": None, "ci95": None}
    assert rolling.summary(result) == "return 3 (2 to 4)"
    result |= {"success": 0.5, "ci95": [0.25, 0.75]}
    assert rolling.summary(result) == "success 0.5 (0.25 to 0.75), return 3"


def test_an_environment_that_fails_to_close_is_used(right, tmp_path):
    def close(env):
        raise RuntimeError("the window is gone")

    name = toy("ToyClose-v0", observation=VECTOR, render=lambda env: FRAME, close=close)
    assert rollout(right, name, tmp_path / "out", "--episodes", "1")["episodes"] == 1
