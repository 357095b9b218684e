"""The loop that drives a robot at a fixed rate, and the link to it that cannot block the loop.

All calls to the robot's driver run one after another on one thread of their own. When a call does not return
in time the loop goes on without it: it holds still, then stops, and always disconnects.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentact.errors import UserError
from latentact.robots.connection import Link, Robot, RobotTimeoutError, _one_line
from latentact.robots.safety import Safety, UnsafeActionError

log = logging.getLogger(__name__)


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
        except RobotTimeoutError as error:
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
        with contextlib.suppress(RobotTimeoutError):
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
