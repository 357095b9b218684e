"""The safety layer's numbers by hand, and the control loop with robots that misbehave."""

import math
import os
import signal
import threading
import time

import numpy as np
import pytest

from latentact.errors import UserError
from latentact.robots import connection
from latentact.robots import control as control_module
from latentact.robots.connection import RobotFault
from latentact.robots.control import ControlEnd, ControlLog, control
from latentact.robots.safety import Safety, SafetyConfig, UnsafeActionError, UnsafeReason
from latentact.robots.setup import RobotSetup, RobotView, make_robot

JOINTS = ("x.pos", "y.pos")
QUICK = {"stale_s": 0.5, "stop_after_s": 1.5}


class Clock:
    """Time that passes only while somebody sleeps, so that no count depends on the machine's load."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """Virtual time for the loop; only a driver call that never returns is waited for in real time."""
    virtual = Clock()
    monkeypatch.setattr(control_module, "time", virtual)
    monkeypatch.setattr(connection, "time", virtual)
    return virtual


def safety(joints=JOINTS, **settings):
    return Safety(joints, SafetyConfig.from_dict(settings))


class Fake:
    """A robot at (100, 50) that moves at once, and fails as a test asks."""

    name = "fake"
    observation_features = {"x.pos": float, "y.pos": float, "top": (4, 4, 3)}  # noqa: RUF012
    action_features = {"x.pos": float, "y.pos": float}  # noqa: RUF012

    def __init__(self, breaks=None, after=0):
        self.breaks, self.after, self.reads, self.sent = breaks, after, 0, []
        self.at = {"x.pos": 100.0, "y.pos": 50.0}
        self.is_connected, self.disconnects, self.release = False, 0, threading.Event()

    def connect(self):
        if self.breaks == "connect":
            raise OSError("no such port")
        self.is_connected = True

    def get_observation(self):
        self.reads += 1
        seen = {**self.at, "top": np.zeros((4, 4, 3), np.uint8)}
        if self.reads > self.after:
            if self.breaks == "block":
                self.release.wait()
            if self.breaks == "raise":
                raise ConnectionError("bus error\nsecond line")
            if self.breaks == "nan":
                seen["y.pos"] = math.nan
            if self.breaks == "missing":
                del seen["top"]
            if self.breaks == "image":
                seen["top"] = np.zeros((2, 2, 3), np.uint8)
            if self.breaks == "once" and self.reads == self.after + 1:
                raise ConnectionError("a glitch")
        return seen

    def send_action(self, action):
        if self.breaks == "send" and len(self.sent) >= self.after:
            raise TimeoutError("motor 3")
        self.sent.append(dict(action))
        self.at = dict(action)
        return action

    def disconnect(self):
        self.disconnects += 1
        if self.breaks == "disconnect":
            raise OSError("torque cannot be switched off")
        self.is_connected = False


def drive(robot, act, *, fps=10.0, max_steps=8, **settings):
    record = ControlLog(fps=fps)
    layer = safety(**(QUICK | settings))
    control(robot, act, layer, record, max_steps=max_steps)
    return record


def right(observation):
    return np.array([observation["x.pos"] + 10, observation["y.pos"]])


# --- numbers


def test_limits_then_largest_step_by_hand():
    layer = safety(limits={"x": [0, 200], "y.pos": [-10, 60]}, max_step={"x": 30})
    layer.start({"x.pos": 100.0, "y.pos": 50.0})
    assert layer.clip_or_reject([110.0, 55.0]) == {"x.pos": 110.0, "y.pos": 55.0}
    assert layer.clip_or_reject([500.0, 55.0]) == {
        "x.pos": 140.0,
        "y.pos": 55.0,
    }  # 200 by limit, 110 + 30 by step
    assert layer.clip_or_reject([139.0, 99.0]) == {"x.pos": 139.0, "y.pos": 60.0}
    assert layer.clip_or_reject([-9.0, -99.0]) == {"x.pos": 109.0, "y.pos": -10.0}
    assert dict(layer.clipped) == {"x.pos limit": 2, "x.pos step": 2, "y.pos limit": 2}
    assert layer.hold() == {"x.pos": 109.0, "y.pos": -10.0}


def test_every_command_is_within_limits_and_steps():
    layer = safety(limits={"x": [0, 10], "y": [-1, 1]}, max_step={"x": 3, "y": 0.5})
    layer.start({"x.pos": 5.0, "y.pos": 0.0})
    before = np.array([5.0, 0.0])
    for action in np.random.default_rng(0).normal(0, 100, (300, 2)):
        sent = np.array([*layer.clip_or_reject(action).values()])
        assert (sent >= [0, -1]).all()
        assert (sent <= [10, 1]).all()
        assert (np.abs(sent - before) <= [3 + 1e-9, 0.5 + 1e-9]).all()
        before = sent


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ([math.nan, 0.0], "non-finite action: x.pos is nan"),
        ([0.0, math.inf], "non-finite action: y.pos is inf"),
        ([1.0], r"action of wrong shape: must be \[2\], got \[1\]"),
        ([[1.0, 2.0]], "wrong shape"),
        (["left", "right"], "wrong shape: got list"),
        (3.0, "wrong shape"),
    ],
)
def test_a_rejected_action_has_no_effect(action, reason):
    layer = safety(limits={"x": [0, 200]})
    layer.start({"x.pos": 100.0, "y.pos": 50.0})
    with pytest.raises(UnsafeActionError, match=reason) as raised:
        layer.clip_or_reject(action)
    assert layer.hold() == {"x.pos": 100.0, "y.pos": 50.0}
    assert layer.refused == {raised.value.reason: 1}


def test_holding_still_commands_zero_velocity():
    layer = safety(("arm.pos", "base.vel"))
    layer.start({"arm.pos": 3.0})
    layer.clip_or_reject([4.0, 0.7])
    assert layer.hold() == {"arm.pos": 4.0, "base.vel": 0.0}


def test_a_start_that_cannot_be_safe_is_refused():
    with pytest.raises(UserError, match=r"x.pos must be between 0 and 200 at the start, got 300"):
        safety(limits={"x": [0, 200]}).start({"x.pos": 300.0, "y.pos": 0.0})
    with pytest.raises(UserError, match=r"safety.max_step.x.pos needs the joint's position"):
        safety(max_step={"x": 3}).start({"y.pos": 0.0})
    unknown = safety()
    unknown.start({})
    assert unknown.hold() is None, "its position is unknown"
    assert unknown.unlimited == ["x.pos", "y.pos"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limits": {"z": [0, 1]}}, "no joint 'z'"),
        ({"limits": {"x": [1, 0]}}, r"safety.limits.x must be \[min, max\], got \[1.0, 0.0\]"),
        ({"limits": {"x": 3}}, r"safety.limits.x must be \[min, max\], got 3"),
        ({"limits": {"x": [0, math.nan]}}, "safety.limits.x must be a finite number, got nan"),
        ({"max_step": {"x": 0}}, "safety.max_step.x must be greater than 0 and finite, got 0.0"),
        ({"max_step": 3}, "safety.max_step must map joints to values, got 3"),
        ({"stale_s": -1}, "safety.stale_s must be greater than 0 and finite, got -1.0"),
        ({"limit": {}}, "unknown setting 'safety.limit'; did you mean 'limits'"),
        ("none", "safety must be a mapping, got 'none'"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        Safety(JOINTS, SafetyConfig.from_dict(settings))


# --- the loop


def test_the_loop_keeps_its_rate_in_real_time():
    start = time.monotonic()
    drive(Fake(), right, fps=50.0, max_steps=10, stale_s=5.0, stop_after_s=5.0)
    assert time.monotonic() - start >= 10 / 50


def test_a_good_robot_is_driven_and_disconnected(clock):
    robot, start = Fake(), clock.now
    record = drive(robot, right, fps=50.0, max_steps=10, limits={"x": [0, 150]}, max_step={"x": 8})
    assert clock.now - start == pytest.approx(10 / 50)
    assert record.seconds == pytest.approx(9 / 50)
    xs = [command["x.pos"] for command in robot.sent[:10]]
    assert xs == [108.0, 116.0, 124.0, 132.0, 140.0, 148.0, 150.0, 150.0, 150.0, 150.0]
    assert robot.sent[10:] == [robot.sent[9]], "the last command holds it still"
    assert (record.commands, record.steps, record.end) == (10, 10, ControlEnd.MAX_STEPS)
    assert record.disconnected
    assert (robot.is_connected, robot.disconnects) == (False, 1)
    steps = [event for event in record.events if event["kind"] == "clipped x.pos step"]
    assert [(event["from_step"], event["to_step"]) for event in steps] == [(0, 5)]
    assert len(record.events) == 2, "one more where the limit is reached"


def test_the_end_of_the_guide_disconnects(clock):
    robot, left = Fake(), [3]

    def act(observation):
        left[0] -= 1
        return right(observation) if left[0] >= 0 else None

    record = drive(robot, act)
    assert (record.commands, record.end) == (3, ControlEnd.GUIDE_END)
    assert not robot.is_connected


def test_missed_deadlines_are_counted_and_not_made_up_for(clock):
    robot, times = Fake(), []

    def slow(observation):
        times.append(clock.now)
        clock.sleep(0.06 if len(times) == 2 else 0.0)
        return right(observation)

    record = drive(robot, slow, fps=50.0, max_steps=6)
    assert record.missed_deadlines == 1
    assert record.latest_s == pytest.approx(0.04), "0.06 s for a step of 0.02 s"
    assert np.diff(times) == pytest.approx([0.02, 0.06, 0.02, 0.02, 0.02]), "no burst after the delay"


@pytest.mark.parametrize(
    ("breaks", "fault", "message"),
    [
        ("block", RobotFault.TIMEOUT, "no response while observing"),
        ("raise", RobotFault.DRIVER, "observing failed: ConnectionError: bus error second line"),
        ("nan", RobotFault.OBSERVATION, "the observed y.pos must be finite, got nan"),
        ("missing", RobotFault.OBSERVATION, "the observation lacks top"),
        ("image", RobotFault.OBSERVATION, r"the image top must be uint8 \[4, 4, 3\], got uint8 \[2, 2, 3\]"),
        ("send", RobotFault.DRIVER, "acting failed: TimeoutError: motor 3"),
    ],
)
def test_a_robot_that_fails_is_held_still_then_disconnected(clock, breaks, fault, message):
    robot, start = Fake(breaks, after=3), clock.now
    record, layer = ControlLog(fps=2.0), safety(**QUICK)
    with pytest.raises(UserError, match=rf"the robot fake was held still for .*{message}.*control stopped"):
        control(robot, right, layer, record, max_steps=100)
    assert clock.now - start <= 3 / 2 + QUICK["stop_after_s"] + 1 / 2
    assert record.commands == 3
    assert {(c["x.pos"], c["y.pos"]) for c in robot.sent[2:]} == {(130.0, 50.0)}, "only: stay"
    assert record.holds[fault] > 0
    assert record.end is ControlEnd.ERROR
    assert record.disconnected
    assert not robot.is_connected
    robot.release.set()


def test_a_glitch_is_held_through(clock):
    robot = Fake("once", after=2)
    record = drive(robot, right, max_steps=6)
    assert (record.commands, record.steps, record.holds[RobotFault.DRIVER]) == (6, 7, 1)
    assert [command["x.pos"] for command in robot.sent[:7]] == [
        110.0,
        120.0,
        120.0,
        130.0,
        140.0,
        150.0,
        160.0,
    ]


def test_a_late_observation_is_not_acted_on(clock):
    robot, acted = Fake(), []

    def read_slowly(own=robot.get_observation):
        clock.sleep(0.9 if robot.reads == 1 else 0.0)
        return own()

    robot.get_observation = read_slowly
    record = drive(robot, lambda o: acted.append(o) or right(o), max_steps=3)
    assert (record.commands, len(acted)) == (3, 3)
    assert record.holds == {RobotFault.STALE: 1}
    assert record.events[0]["message"] == "the observation is 0.90 s old"


def test_a_late_action_is_not_sent(clock):
    robot, asked = Fake(), []

    def slow_once(observation):
        asked.append(1)
        clock.sleep(0.8 if len(asked) == 3 else 0.0)
        return right(observation)

    record = drive(robot, slow_once, max_steps=4)
    assert (record.commands, record.holds) == (4, {UnsafeReason.LATE: 1})
    assert [command["x.pos"] for command in robot.sent[:5]] == [110.0, 120.0, 120.0, 130.0, 140.0]


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [1.0], "x"])
def test_rejected_actions_are_never_sent(clock, bad):
    robot, asked = Fake(), []

    def act(observation):
        asked.append(1)
        return right(observation) if len(asked) <= 2 else np.array(bad)

    with pytest.raises(UserError, match=r"was held still for .*action"):
        drive(robot, act, max_steps=100)
    assert robot.sent[:2] == [{"x.pos": 110.0, "y.pos": 50.0}, {"x.pos": 120.0, "y.pos": 50.0}]
    assert all(command == robot.sent[1] for command in robot.sent[2:])
    assert not robot.is_connected


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_happens_in_the_policy_the_robot_is_disconnected(clock, error):
    robot = Fake()

    def act(observation):
        if robot.reads == 3:
            raise error("now")
        return right(observation)

    with pytest.raises(error):
        drive(robot, act)
    assert robot.sent[-1] == robot.sent[-2] == {"x.pos": 120.0, "y.pos": 50.0}
    assert not robot.is_connected


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signals_disconnect_even_while_the_robot_blocks(number, raised):
    robot, record = Fake("block", after=2), ControlLog(fps=50.0)
    before = signal.getsignal(number)
    released = robot.release.wait
    robot.release.wait = lambda: (
        os.kill(os.getpid(), number) or released()
    )  # the signal comes while it blocks
    with pytest.raises(raised):
        control(robot, right, safety(stale_s=1.0, stop_after_s=60.0), record, max_steps=100)
    assert record.end is ControlEnd.INTERRUPTED
    assert record.disconnected
    assert not robot.is_connected
    assert signal.getsignal(number) == before
    robot.release.set()


def test_a_robot_that_does_not_connect_or_disconnect(clock, monkeypatch, caplog):
    robot = Fake("connect")
    with pytest.raises(UserError, match="the robot fake cannot be used: connecting failed: OSError: no such"):
        drive(robot, right)
    assert robot.sent == []
    robot = Fake("disconnect")
    with pytest.raises(UserError, match="torque cannot be switched off"):
        drive(robot, right, max_steps=2)
    assert "torque" in caplog.text
    robot = Fake()
    robot.disconnect = lambda: robot.release.wait()
    monkeypatch.setattr(connection, "DISCONNECT_S", 0.1)
    with pytest.raises(UserError, match="no response while disconnecting"):
        drive(robot, right, max_steps=2)
    robot.release.set()


# --- the file


def test_a_robots_file(tmp_path):
    path = tmp_path / "robot.yaml"
    path.write_text(
        "robot: {type: pusht_sim, seed: 3}\n"
        "cameras: {top: observation.images.front}\n"
        "safety: {limits: {x: [0, 512]}, max_step: {y: 30}, stale_s: 0.2}\n"
    )
    setup = RobotSetup.read(path)
    assert setup.robot == {"type": "pusht_sim", "seed": 3}
    assert setup.cameras == {"top": "observation.images.front"}
    assert setup.safety == SafetyConfig(limits={"x": (0.0, 512.0)}, max_step={"y": 30.0}, stale_s=0.2)
    for content, message in (
        ("", "has no robot"),
        ("robot: [1", "cannot be read"),
        ("robot: {type: a}\nsaftey: {}", "unknown setting 'saftey'; did you mean 'safety'"),
        ("robot: {type: a}\ncameras: [top]", "cameras must map"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            RobotSetup.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        RobotSetup.read(tmp_path / "none.yaml")


def test_a_robots_view_and_its_compatibility():
    view = RobotView(Fake(), {})
    seen = view(Fake().get_observation(), "push")
    assert seen["observation.state"].tolist() == [100.0, 50.0]
    assert seen["observation.images.top"].shape == (4, 4, 3)
    assert seen["task"] == "push"
    assert {key: np.shape(value) for key, value in view(view.blank()).items()} == {
        key: np.shape(value) for key, value in seen.items()
    }
    view.check_compatible(cameras=("observation.image",), state_size=2, action_size=2)
    for wrong, message in (
        ({"cameras": ("a", "b")}, "needs the image a, but the robot has observation.images.top"),
        ({"state_size": 3}, r"a state of 3 dimensions, but the robot observes 2 \(x.pos, y.pos\)"),
        ({"action_size": 7}, "returns 7 values, but the robot has 2 joints"),
    ):
        with pytest.raises(UserError, match=message):
            view.check_compatible(**({"cameras": (), "state_size": 0, "action_size": 2} | wrong))
    with pytest.raises(UserError, match="no camera 'tpo'; did you mean 'top'"):
        RobotView(Fake(), {"tpo": "observation.images.top"})


def test_lerobot_robots_by_type():
    for settings, message in (
        ({"type": "so102_follower"}, "unknown robot type 'so102_follower'; did you mean 'so10[01]_follower'"),
        ({"type": "so101_follower"}, "so101_follower cannot be created: .*port"),
        ({"type": "pusht_sim", "sed": 3}, "robot pusht_sim cannot be created: .*sed"),
        ({"type": "pusht_sim", "fault": "fire"}, "cannot be created: .*fault must be .*got 'fire'"),
    ):
        with pytest.raises(UserError, match=message):
            make_robot(settings)


def test_the_simulated_robot(monkeypatch, tmp_path):
    robot = make_robot({"type": "pusht_sim", "seed": 1, "image_size": 32, "calibration_dir": str(tmp_path)})
    record = drive(
        robot, right, max_steps=4, fps=200.0, stale_s=5.0, stop_after_s=5.0, limits={"x": [0, 512]}
    )
    assert (record.commands, record.end, robot.is_connected) == (4, ControlEnd.MAX_STEPS, False)
    robot.connect()
    first = robot.get_observation()
    assert first["top"].shape == (32, 32, 3)
    for _ in range(6):
        robot.send_action({"x.pos": first["x.pos"] + 40, "y.pos": first["y.pos"]})
    assert robot.get_observation()["x.pos"] == pytest.approx(first["x.pos"] + 40, abs=8)
    robot.disconnect()
