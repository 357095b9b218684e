"""The loop that drives a robot at a fixed rate, and the link to it that cannot block the loop.

All calls to the robot's driver run one after another on one thread of their own. When a call does not return
in time the loop goes on without it: it holds still, then stops, and always disconnects.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from latentact.errors import UserError
from latentact.robots.safety import Safety, UnsafeActionError

log = logging.getLogger(__name__)

DISCONNECT_S = 5.0
"""Seconds that a robot has to disconnect."""
CONNECT_S = 120.0
"""Seconds that a robot has to connect; some calibrate meanwhile."""


@runtime_checkable
class Robot(Protocol):
    """What of LeRobot's `Robot` is used."""

    name: str

    @property
    def observation_features(self) -> dict[str, Any]:
        """Name -> float, or the shape of a picture."""
        ...

    @property
    def action_features(self) -> dict[str, Any]:
        """Name -> float."""
        ...

    @property
    def is_connected(self) -> bool:
        """Whether it is connected."""
        ...

    def connect(self) -> None:
        """Open it."""
        ...

    def get_observation(self) -> dict[str, Any]:
        """Return what it senses."""
        ...

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Move it."""
        ...

    def disconnect(self) -> None:
        """Close it."""
        ...


@dataclass(kw_only=True)
class ControlLog:
    """What happened in a run; complete at any moment, also when the run ends by an error."""

    fps: float
    """Steps per second asked for."""
    ended: str = "not started"
    """Why it ended."""
    steps: int = 0
    """Steps, those of holding still included."""
    commands: int = 0
    """Actions of the policy that were sent."""
    missed_deadlines: int = 0
    """Steps that took longer than their time."""
    latest_s: float = 0.0
    """Largest delay of a step beyond its time."""
    seconds: float = 0.0
    """Wall clock from the first step to the last."""
    holds: Counter[str] = field(default_factory=Counter)
    """Steps of holding still by reason."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Runs of steps in which something other than a plain command happened."""
    disconnected: bool = False
    """Whether the robot was disconnected in the end."""

    def event(self, what: str, said: str) -> None:
        """Note something about the present step; equal ones in a row become one entry."""
        last = next((event for event in reversed(self.events) if event["what"] == what), None)
        if last is not None and last["to_step"] >= self.steps - 1:
            last["to_step"] = self.steps
        else:
            self.events.append({"what": what, "said": said, "from_step": self.steps, "to_step": self.steps})

    def hold(self, what: str, said: str) -> None:
        """Note that the robot holds still in this step."""
        self.holds[what] += 1
        self.event(what, said)


class _NoAnswer(Exception):
    """The robot did not do what it was asked; the message says what happened."""


class Link:
    """The only way to the robot: each driver call on one thread, with a time limit.

    Args:
        robot: any LeRobot robot, not connected.
    """

    def __init__(self, robot: Robot) -> None:
        self.robot = robot
        self._calls: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple[Any, ...]]] = (
            queue.SimpleQueue()
        )
        self._last: Future | None = None
        self._reading: tuple[float, Future] | None = None
        self.asked = 0.0
        """When the last observation was asked for, by the monotonic clock."""
        self.closed = False
        """Whether it was disconnected."""
        threading.Thread(target=self._work, name="robot", daemon=True).start()

    def _work(self) -> None:
        while True:
            future, call, arguments = self._calls.get()
            try:
                future.set_result(call(*arguments))
            except BaseException as error:  # handed to whoever waits, as concurrent.futures does
                future.set_exception(error)

    @property
    def busy(self) -> bool:
        """Whether a call has not returned."""
        return self._last is not None and not self._last.done()

    def _submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        self._last = Future()
        self._calls.put((self._last, call, arguments))
        return self._last

    def _answer(self, future: Future, timeout: float, doing: str) -> Any:
        try:
            error = future.exception(timeout)
        except TimeoutError:
            raise _NoAnswer(f"it does not answer while {doing}") from None
        if error is not None:
            raise _NoAnswer(f"{doing} failed: {_one_line(error)}")
        return future.result()

    def connect(self) -> None:
        """Connect.

        Raises:
            UserError: it cannot be connected.
        """
        try:
            self._answer(self._submit(self.robot.connect), CONNECT_S, "connecting")
        except _NoAnswer as error:
            raise UserError(f"the robot {self.robot.name} cannot be used: {error}; check it.") from error

    def observe(self, timeout: float, stale_s: float) -> dict[str, Any]:
        """Return what the robot senses now, whole, finite and asked for less than `stale_s` ago."""
        if self._reading is None:
            self._reading = time.monotonic(), self._submit(self.robot.get_observation)
        self.asked, future = self._reading
        try:
            observation = self._answer(future, timeout, "observing")
        finally:
            if future.done():
                self._reading = None
        if (age := time.monotonic() - self.asked) > stale_s:
            raise _NoAnswer(f"an observation is {age:.2f} s old")
        self._check(observation)
        return observation

    def _check(self, observation: Any) -> None:
        for name, kind in self.robot.observation_features.items():
            value = observation.get(name) if isinstance(observation, Mapping) else None
            if value is None:
                raise _NoAnswer(f"the observation lacks {name}")
            if isinstance(kind, tuple):
                if tuple(value.shape) != tuple(kind) or value.dtype != np.uint8:
                    raise _NoAnswer(f"the picture {name} is {value.dtype} {list(value.shape)}")
            elif not math.isfinite(value):
                raise _NoAnswer(f"the observed {name} is {value}")

    def send(self, command: dict[str, float], timeout: float) -> None:
        """Send a command that the safety layer made."""
        if self.busy:
            raise _NoAnswer("it does not answer")
        self._answer(self._submit(self.robot.send_action, command), timeout, "acting")

    def close(self, hold: dict[str, float] | None) -> str:
        """Make the robot hold still where it answers, and disconnect it in any case; returns what failed."""
        failed = []
        if hold is not None and not self.busy:
            try:
                self.send(hold, 1.0)
            except _NoAnswer as error:
                failed.append(str(error))
        if self.busy:  # the thread hangs in the driver: disconnect beside it
            threading.Thread(target=self._work, name="robot", daemon=True).start()
        try:
            self._answer(self._submit(self._disconnect), DISCONNECT_S, "disconnecting")
            self.closed = True
        except _NoAnswer as error:
            failed.append(str(error))
        return "; ".join(failed)

    def _disconnect(self) -> None:
        if self.robot.is_connected:
            self.robot.disconnect()


def control(
    robot: Robot,
    act: Callable[[dict[str, Any]], np.ndarray | None],
    safety: Safety,
    record: ControlLog,
    *,
    max_steps: int,
    watch: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:
    """Connect a robot, drive it at `record.fps`, and disconnect it however this ends.

    Where there is no observation to act on, `act` is not called: the guide waits.

    Args:
        robot: any LeRobot robot, not connected.
        act: whole observation -> a number per joint, None when there is nothing more to do.
        safety: what every action goes through.
        record: filled in as it goes.
        max_steps: commands after which it ends.
        watch: is shown every observation that was acted on.

    Raises:
        UserError: the robot cannot be connected, stopped answering, or held still for too long.
    """
    link = Link(robot)
    with _terminable():
        try:
            link.connect()
            _run(link, act, safety, record, max_steps, watch)
        except (KeyboardInterrupt, SystemExit):
            record.ended = "interrupted"
            raise
        except UserError as error:
            record.ended = str(error)
            raise
        except BaseException as error:
            record.ended = f"error: {_one_line(error)}"
            raise
        finally:
            with _undisturbed():
                failed = link.close(safety.hold())
            record.disconnected = link.closed
            if failed:
                log.error("the robot %s did not close as it should: %s", robot.name, failed)
    if failed:
        record.ended = f"the robot {robot.name} did not close as it should: {failed}"
        raise UserError(f"{record.ended}; switch it off by hand.")


def _run(
    link: Link,
    act: Callable[[dict[str, Any]], np.ndarray | None],
    safety: Safety,
    record: ControlLog,
    max_steps: int,
    watch: Callable[[dict[str, Any]], None],
) -> None:
    period, limits = 1 / record.fps, safety.config
    begun = due = fine = time.monotonic()
    while record.commands < max_steps:
        try:
            observation = link.observe(limits.stale_s, limits.stale_s)
            if safety.last is None:
                safety.start(observation)
            action = act(observation)
            if action is None:
                record.ended = "the guide is over"
                return
            if (age := time.monotonic() - link.asked) > limits.stale_s:
                raise UnsafeActionError(f"action too late: what it is for was seen {age:.2f} s ago")
            link.send(_admitted(safety, action, record), limits.stale_s)
            watch(observation)
            record.commands += 1
            fine = time.monotonic()
        except _NoAnswer as error:
            record.hold("robot", str(error))
            _hold(link, safety)
        except UnsafeActionError as error:
            record.hold(str(error).partition(":")[0], str(error))
            _hold(link, safety)
        record.steps += 1
        now = time.monotonic()
        record.seconds = now - begun
        if now - fine > limits.stop_after_s:
            raise UserError(
                f"the robot {link.robot.name} held still for {now - fine:.1f} s "
                f"({record.events[-1]['said']}) and control has stopped; check the robot and the policy, "
                "then run the same command again."
            )
        due += period
        if now > due:
            record.missed_deadlines += 1
            record.latest_s = max(record.latest_s, now - due)
            due = now  # late is late: no burst of commands to catch up
        time.sleep(max(0.0, due - now))
    record.ended = "the last step was taken"


def _admitted(safety: Safety, action: Any, record: ControlLog) -> dict[str, float]:
    before = Counter(safety.clipped)
    command = safety.admit(action)
    for what in safety.clipped - before:
        record.event(f"clipped {what}", f"clipped {what}")
    return command


def _hold(link: Link, safety: Safety) -> None:
    still = safety.hold()
    if still is not None and not link.busy:
        with contextlib.suppress(_NoAnswer):
            link.send(still, safety.config.stale_s)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that the robot is disconnected."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no second Ctrl-C or SIGTERM interrupt the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
