import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from latentact.envs.checks import check_compatible, check_ranges, check_step_limit
from latentact.envs.frames import to_rgb
from latentact.envs.spec import EnvError, Expert, ExpertStuckError, env_spec, make_env, make_expert
from latentact.errors import UserError
from latentact.types import ActionSpace
from toy_env import FRAME, IMAGE, VECTOR, Toy, toy


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
    with pytest.raises(UserError, match=r"view must be agent or full, got 'ful'\."):
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


@pytest.mark.parametrize("level", ["PickupLoc", "PutNextLocal"])
def test_a_bot_that_is_told_what_was_done_instead_succeeds_all_the_same(level):
    env, successes = make_env(f"babyai/{level}"), 0
    for seed in range(8):
        env.reset(seed=seed)
        expert, rng, ended = make_expert(f"babyai/{level}", env, seed), np.random.default_rng(seed), False
        while not ended:
            action = expert.act()
            if rng.random() < 0.4:
                action = int(rng.integers(5))  # left, right, forward, pickup or drop
                expert.report_action(action)
            _, _, ended, truncated, info = env.step(action)
            ended = ended or truncated
        successes += info["is_success"]
    assert successes == 8


@pytest.mark.parametrize("seed", [0, 1])
def test_the_planner_of_pusht_reaches_the_goal_from_wherever_others_bring_it(seed):
    """A third of the steps are somebody else's: five in a row to a random place."""
    env = make_env("pusht", resolution=32)
    env.reset(seed=seed)
    expert, rng = make_expert("pusht", env, seed), np.random.default_rng(seed)
    left, away, ended = 0, np.zeros(2), False
    assert np.array_equal(expert.act(), expert.act())
    while not ended:
        action = expert.act()
        if left == 0 and rng.random() < 0.06:
            left, away = 5, rng.uniform(-25, 25, 2)
        if left:
            left -= 1
            action = np.clip(env.unwrapped.agent.position + away, 20, 492).astype(np.float32)
        _, _, ended, truncated, info = env.step(action)
        ended = ended or truncated
    assert info["is_success"]


def test_no_expert_is_a_user_error():
    env = make_env("MountainCar-v0")
    with pytest.raises(
        UserError, match=r"scripted expert .* Choose an environment of babyai, metaworld, procgen, pusht"
    ):
        make_expert("MountainCar-v0", env, 0)


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
    with pytest.raises(UserError, match="must have image observations or an rgb_array render mode"):
        make_env("ToyVector-v0")


def test_gymnasiums_name_of_pusht_is_pusht():
    assert env_spec("gym_pusht/PushT-v0") == env_spec("PushT-v0") == env_spec("pusht")


# --- actions


@pytest.mark.parametrize(
    "space", [MultiDiscrete([2, 3]), MultiBinary(3), Tuple([Discrete(2)]), Dict(a=VECTOR), Box(-1, 1, (2, 3))]
)
def test_other_action_spaces_are_one_sentence(space):
    with pytest.raises(UserError, match=r"the action of ToyAction-v0 must be a Discrete or .* Box, got"):
        env_spec(toy("ToyAction-v0", action=space))


def test_a_choice_may_start_anywhere():
    spec = env_spec(toy("ToyStart-v0", action=Discrete(3, start=-1)))
    assert spec.action_space == ActionSpace(kind="discrete", size=3, values=(-1, 0, 1))
    assert spec.action_names == ("action_-1", "action_0", "action_1")
    assert env_spec(toy("ToyZero-v0")).action_space == ActionSpace(kind="discrete", size=2)


@pytest.mark.parametrize("action", [1, 3, np.int64(2), np.array([3]), np.uint8(1)])
def test_a_discrete_action_is_taken_as_it_is(action):
    env = make_env(toy("ToyStart-v0", action=Discrete(3, start=1)))
    env.reset(seed=0)
    env.step(action)
    assert Toy.taken == [int(np.ravel(action)[0])]
    assert type(Toy.taken[0]) is int


@pytest.mark.parametrize(
    "action", [0, 4, -1, 1.0, np.array([1, 2]), np.float32(1), True, None, "1", [0.5, 0.1]]
)
def test_a_discrete_action_of_another_kind_is_refused(action):
    env = make_env(toy("ToyStart-v0", action=Discrete(3, start=1)))
    env.reset(seed=0)
    with pytest.raises(
        UserError, match="action of step 1 in ToyStart-v0 must be an integer from 1 to 3, got"
    ):
        env.step(action)
    assert Toy.taken == []


def test_a_continuous_action_is_clipped(caplog):
    env = make_env(toy("ToyBox-v0", action=Box(np.array([-1, 0]), np.array([1, np.inf]), dtype=np.float32)))
    env.reset(seed=0)
    for action in ([0.5, 7], np.array([-3.0, -1e9]), np.array([2, 10**6])):
        env.step(np.asarray(action))
    np.testing.assert_array_equal(Toy.taken, [[0.5, 7], [-1, 0], [1, 10**6]])
    assert all(action.dtype == np.float32 for action in Toy.taken)
    assert caplog.text.count("actions outside its bounds are clipped") <= 1
    env = make_env(toy("ToyWhole-v0", action=Box(0, 9, (2,), np.int64)))
    env.reset(seed=0)
    env.step(np.array([2.6, 11.2], np.float32))
    assert (Toy.taken[0].tolist(), Toy.taken[0].dtype) == ([3, 9], np.int64)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([np.nan, 0], r"must be finite, got \[nan, 0.0\]. Train the policy again"),
        ([0, np.inf], "must be finite"),
        ([0.0], r"must be numbers of shape \(2,\), got \[0.0\]"),
        ([[0.0, 0.0]], r"must be numbers of shape \(2,\)"),
        (1, r"must be numbers of shape \(2,\), got 1"),
        (["a", "b"], r"must be numbers of shape \(2,\)"),
    ],
)
def test_a_continuous_action_of_another_kind_is_refused(action, message):
    env = make_env(toy("ToyBox2-v0", action=VECTOR))
    env.reset(seed=0)
    env.step(np.zeros(2))
    with pytest.raises(UserError, match="the action of step 2 in ToyBox2-v0 " + message):
        env.step(action)
    assert len(Toy.taken) == 1


# --- what an environment does wrong


def raises(error):
    def part(*_):
        raise error

    return part


def replaced(place, value):
    return lambda _, default: (*default[:place], value, *default[place + 1 :])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"step": raises(RuntimeError("jammed\nat x."))}, "failed at step 1 of the episode with reset "
         "seed 7: RuntimeError: jammed at x. Fix"),
        ({"step": raises(AssertionError())}, "failed at step 1 of .* seed 7: AssertionError. Fix"),
        ({"step": replaced(1, np.nan)}, "must return a finite reward, got nan at step 1 of .* seed 7"),
        ({"step": replaced(1, np.array([1.0, 2.0]))}, "failed at step 1 of .*: ValueError"),
        ({"step": replaced(1, None)}, "failed at step 1 of .*: TypeError"),
        ({"step": lambda _, default: default[:4]}, "failed at step 1 of .*: ValueError: not enough values"),
        ({"step": replaced(0, None)}, "the image observation of ToyWrong-v0 must return an image .*got None"),
    ],
)  # fmt: skip
def test_what_a_step_does_wrong_names_environment_and_step(parts, message):
    env = make_env(toy("ToyWrong-v0", **parts))
    env.reset(seed=7)
    with pytest.raises(EnvError, match=message):
        env.step(0)


def test_a_state_that_is_not_finite_is_refused():
    space = Dict(image=IMAGE, state=VECTOR)
    for bad, got in ((np.nan, r"\[nan, 0.0\]"), (np.inf, r"\[inf, 0.0\]")):
        name = toy(
            "ToyState-v0",
            observation=space,
            observe=lambda env, bad=bad: {"image": FRAME, "state": np.array([bad if env.steps else 0, 0])},
        )
        env = make_env(name)
        env.reset(seed=0)
        with pytest.raises(
            EnvError, match=f"must return a finite state of 2 dimensions, got {got} at step 1"
        ):
            env.step(0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"reset": raises(OSError("no display"))}, "ToyReset-v0 failed at reset: OSError: no display"),
        ({"reset": lambda _: FRAME}, "ToyReset-v0 failed at reset: "),
        (
            {"observation": Box(0, 255, (8,), np.uint8)},
            "gives no RGB image .* and cannot draw one|must return an",
        ),
    ],
)
def test_what_fails_at_reset_is_one_sentence(parts, message):
    parts = {"render": lambda _: None, **parts}
    with pytest.raises(UserError, match=message):
        make_env(toy("ToyReset-v0", **parts))


def test_an_environment_that_cannot_be_made_or_closed(caplog):
    gymnasium.registry.pop("ToyMade-v0", None)
    gymnasium.register("ToyMade-v0", entry_point=raises(ImportError("no simulator")))
    with pytest.raises(EnvError, match="ToyMade-v0 failed to be made: ImportError: no simulator"):
        make_env("ToyMade-v0")
    make_env(toy("ToyClose-v0", close=raises(RuntimeError("gone")))).close()
    assert "ToyClose-v0 failed to close: RuntimeError: gone" in caplog.text


def test_numbers_of_any_kind_are_read():
    kinds = (np.array([2.5]), np.array([True]), np.bool_(False), None)
    env = make_env(toy("ToyKinds-v0", step=lambda _, default: (default[0], *kinds)))
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated) == (2.5, True, False)
    assert all(
        type(value) is kind for value, kind in ((reward, float), (terminated, bool), (truncated, bool))
    )
    assert "is_success" not in info


@pytest.mark.parametrize(
    ("info", "success"),
    [
        ({}, None),
        ({"is_success": None}, None),
        ({"is_success": np.bool_(True)}, True),
        ({"success": 0.0}, False),
        ({"success": torch.tensor([True])}, True),
        ({"final_info": {"is_success": 1}}, True),
        ({"final_info": {"success": False}}, False),
        ({"final_info": None, "is_success": False}, False),
    ],
)
def test_success_by_its_usual_names(info, success):
    env = make_env(toy("ToySuccess-v0", step=replaced(4, info)))
    env.reset(seed=0)
    assert env.step(0)[4].get("is_success") is success


@pytest.mark.parametrize("value", ["no", "yes", "", np.nan, 2, -1, 0.5, [], {}, np.array([True, False]), 1j])
@pytest.mark.parametrize("place", ["is_success", "success", "final_info", 2, 3])
def test_a_flag_that_is_no_boolean_is_an_error(place, value):
    infos = {"final_info": {"final_info": {"success": value}}}
    step = replaced(4, infos.get(place, {place: value})) if isinstance(place, str) else replaced(place, value)
    env = make_env(toy("ToyFlag-v0", step=step))
    env.reset(seed=0)
    with pytest.raises(EnvError, match=r"ToyFlag-v0: .* must be a boolean or the number 0 or 1, got "):
        env.step(0)


class Panic(BaseException):
    """Not an Exception, as those of extensions written in Rust."""


def quit_with(error):
    def run(*_):
        raise error

    return run


@pytest.mark.parametrize("error", [SystemExit(), SystemExit(3), SystemExit("bye"), Panic("no")])
@pytest.mark.parametrize("part", ["reset", "step", "render", "observe"])
def test_an_environment_that_exits_is_an_error(part, error):
    space = {"observation": VECTOR} if part == "render" else {}
    name = toy("ToyExit-v0", **space, **{part: quit_with(error)})

    def play():
        env = make_env(name)
        env.reset(seed=0)
        env.step(0)

    with pytest.raises(EnvError, match=f"ToyExit-v0 failed .*: {type(error).__name__}"):
        play()


def test_an_interrupt_passes_through_an_environment():
    env = make_env(toy("ToyExit-v0", step=quit_with(KeyboardInterrupt())))
    env.reset(seed=0)
    with pytest.raises(KeyboardInterrupt):
        env.step(0)


@pytest.mark.parametrize("name", ["quitting:Quit-v0", "quitting/Quit-v0"])
def test_a_package_that_exits_at_import_is_an_error(tmp_path, monkeypatch, name):
    (tmp_path / "quitting.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvError, match=f"{name} failed to be imported: SystemExit"):
        make_env(name)


# --- names


def test_packages_are_imported_as_gymnasium_does(tmp_path, monkeypatch):
    code = "import gymnasium\nfrom toy_env import toy\ntoy('{0}/Toy-v0')\n"
    for package in ("toypack_a", "toypack_b"):
        (tmp_path / f"{package}.py").write_text(code.format(package))
    (tmp_path / "toypack_bad.py").write_text("raise RuntimeError('no license')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert env_spec("toypack_a/Toy-v0").time_limit
    assert make_env("toypack_a/Toy-v0").step(0)[1] == 1
    assert env_spec("toypack_b:toypack_b/Toy-v0").fps == 20
    with pytest.raises(UserError, match="unknown environment 'toypack_a/Other-v0'"):
        env_spec("toypack_a/Other-v0")
    for name in ("toypack_bad/Toy-v0", "toypack_bad:Toy-v0"):
        with pytest.raises(UserError, match=f"{name} failed to be imported: RuntimeError: no license"):
            env_spec(name)
        sys.modules.pop("toypack_bad", None)


@pytest.mark.parametrize(
    "name", ["nopackage/Toy-v0", "nopackage:nopackage/Toy-v0", "a b/Toy-v0", "/", ":", ".", ".a:b", "a.b:c"]
)
def test_packages_that_do_not_exist(name):
    with pytest.raises(UserError):
        env_spec(name)


# --- what must hold before a policy acts


def test_an_episode_must_end():
    endless = env_spec(toy("ToyEndless-v0", limit=None))
    with pytest.raises(UserError, match=r"ToyEndless-v0 must have a time limit, .* with --max-steps"):
        check_step_limit(endless, 0)
    check_step_limit(endless, 3)
    for name in (toy("ToyLimit-v0"), "babyai/GoToLocal", "pusht"):
        check_step_limit(env_spec(name), 0)


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("episodes", 0, 1),
        ("episodes", 10**12, 10**6),
        ("record", -1, 0),
        ("max_steps", -1, 0),
        ("max_steps", 2**31, 2**31 - 1),
        ("seed", -1, 0),
        ("seed", 10**30, 2**31 - 1),
        ("demos", 1, 2),
    ],
)
def test_ranges(name, value, good):
    check_ranges(**{name: good})
    with pytest.raises(UserError, match=f"{name} must be between .* got {value}"):
        check_ranges(**{name: value})


def classes(size, *values):
    return ActionSpace(kind="discrete", size=size, values=values)


@pytest.mark.parametrize(
    ("policy", "env", "fits"),
    [
        (classes(3), Discrete(3), True),
        (classes(2), Discrete(3), False),
        (classes(4), Discrete(3), False),
        (classes(2, 0, 2), Discrete(3), True),
        (classes(2, 0, 3), Discrete(3), False),
        (classes(3), Discrete(3, start=1), False),
        (classes(3, 1, 2, 3), Discrete(3, start=1), True),
        (classes(1, 3), Discrete(3, start=1), True),
        (classes(2), Discrete(3, start=-1), False),
        (ActionSpace(kind="continuous", size=2), VECTOR, True),
        (ActionSpace(kind="continuous", size=3), VECTOR, False),
        (ActionSpace(kind="continuous", size=2), Discrete(2), False),
        (classes(2), VECTOR, False),
    ],
)
def test_which_actions_fit(policy, env, fits):
    spec = env_spec(toy("ToyFits-v0", action=env))
    if fits:
        check_compatible(spec, "runs/bc", actions=policy, cameras=())
    else:
        with pytest.raises(UserError, match=r"runs/bc has .* but ToyFits-v0 expects .* it was trained for"):
            check_compatible(spec, "runs/bc", actions=policy, cameras=())


def test_one_camera_on_both_sides_may_have_any_name():
    pusht, level = env_spec("pusht"), env_spec("babyai/GoToLocal")

    def check(env, *cameras, **more):
        check_compatible(env, "runs/bc", actions=env.action_space, cameras=cameras, **more)

    for camera in ("", "observation.image", "observation.images.agent", "observation.images.top"):
        check(pusht, camera)
    check(level, "observation.images.top")
    with pytest.raises(UserError, match=r"trained on observation\.images\.full, .* Use --view full"):
        check(level, "observation.images.full")
    check(env_spec("babyai/GoToLocal", view="full"), "observation.images.full")
    with pytest.raises(UserError, match=r"one camera, as pusht has only observation\.images\.top, got a, b"):
        check(pusht, "a", "b")
    with pytest.raises(UserError, match="needs a robot state of 7 dimensions, but pusht has 2"):
        check(pusht, "", state_size=7)
    with pytest.raises(UserError, match="needs frames of 1 channels"):
        check(pusht, "", channels=1)


def test_dark_float_frames_keep_the_scale_that_their_space_names():
    frames = [np.full((32, 32, 3), level, np.float32) for level in (0, 1, 2)]
    assert [int(to_rgb(frame, "x", 255.0).max()) for frame in frames] == [0, 1, 2]
    assert int(to_rgb(frames[1], "x", 1.0).max()) == 255


def test_experts_that_use_the_former_name_of_report_action():
    class Former(Expert):
        actions: list[int] = []  # noqa: RUF012

        def act(self, explore=None):
            return 0

        def took(self, action):
            self.actions.append(action)

    class Current(Former):
        took = Expert.took

        def report_action(self, action):
            super().report_action(action)
            self.actions.append(action)

    with pytest.warns(DeprecationWarning, match=r"use Expert.report_action"):
        Former().report_action(2)
    with pytest.warns(DeprecationWarning, match=r"use Expert.report_action"):
        Current().took(3)
    assert Former.actions == [2, 3]
