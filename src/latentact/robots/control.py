"""The fixed-rate control loop of a robot, which driver calls cannot block.

All driver calls run one after another on a separate thread. When a call does not return in time, the loop
holds the robot still, then stops, and always disconnects.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from latentact.errors import UserError
from latentact.robots.connection import Robot, RobotConnection, RobotError, RobotFault, one_line
from latentact.robots.safety import Safety, UnsafeActionError, UnsafeReason

log = logging.getLogger(__name__)


class ControlEnd(StrEnum):
    """Why control ended."""

    NOT_STARTED = "not started"
    GUIDE_END = "the guide ended"
    MAX_STEPS = "the maximum number of steps was reached"
    ENVIRONMENT = "the environment ended the episode"
    INTERRUPTED = "interrupted"
    ERROR = "an error occurred"


@dataclass(kw_only=True)
class ControlLog:
    """Log of control; up to date at every step, also when control ends with an error."""

    fps: float
    """Requested steps per second."""
    end: ControlEnd = ControlEnd.NOT_STARTED
    """Why it ended."""
    error: str = ""
    """Message of the error that ended it."""
    steps: int = 0
    """Number of steps, including those in which the robot is held still."""
    commands: int = 0
    """Number of policy actions sent."""
    missed_deadlines: int = 0
    """Number of steps that took longer than a period."""
    latest_s: float = 0.0
    """Largest delay of a step, in seconds."""
    seconds: float = 0.0
    """Wall-clock duration from the first step to the last, in seconds."""
    holds: Counter[RobotFault | UnsafeReason] = field(default_factory=Counter)
    """Number of steps in which the robot is held still, by reason."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Ranges of steps with unusual events: kind, message, from_step, to_step."""
    disconnected: bool = False
    """Whether the robot was disconnected at the end."""

    def event(self, kind: str, message: str) -> None:
        """Log an event of the current step; consecutive events of one kind become one entry."""
        last = next((event for event in reversed(self.events) if event["kind"] == kind), None)
        if last is not None and last["to_step"] >= self.steps - 1:
            last["to_step"] = self.steps
        else:
            self.events.append(
                {"kind": kind, "message": message, "from_step": self.steps, "to_step": self.steps}
            )

    def hold(self, kind: RobotFault | UnsafeReason, message: str) -> None:
        """Log that the robot is held still in this step."""
        self.holds[kind] += 1
        self.event(kind, message)

    def to_json(self) -> dict[str, Any]:
        """Return the entries of `metrics.json`; `ended` is the reason as text."""
        values = {**vars(self), "end": self.end.name.lower(), "holds": dict(self.holds)}
        return values | {"ended": self.error or str(self.end)}


def control(
    robot: Robot,
    act: Callable[[dict[str, Any]], np.ndarray | None],
    safety: Safety,
    record: ControlLog,
    *,
    max_steps: int,
    on_observation: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:
    """Connect a robot, control it at `record.fps`, and disconnect it however control ends.

    `act` is only called with an observation; without one, the guide waits.

    Args:
        robot: any LeRobot robot, not connected.
        act: complete observation -> a value per joint; None at the end of the guide.
        safety: clips or rejects every action.
        record: updated at every step.
        max_steps: commands after which control ends.
        on_observation: called with every observation used for an action.

    Raises:
        UserError: the robot cannot be connected, does not respond, or was held still for too long.
    """
    connection = RobotConnection(robot)
    with _sigterm_as_exception():
        try:
            connection.connect()
            _run(connection, act, safety, record, max_steps, on_observation)
        except (KeyboardInterrupt, SystemExit):
            record.end = ControlEnd.INTERRUPTED
            raise
        except BaseException as error:
            record.end = ControlEnd.ERROR
            record.error = str(error) if isinstance(error, UserError) else f"error: {one_line(error)}"
            raise
        finally:
            with _signals_ignored():
                failed = connection.close(safety.hold())
            record.disconnected = connection.closed
            if failed:
                log.error("the robot %s was not closed: %s", robot.name, failed)
    if failed:
        record.end, record.error = ControlEnd.ERROR, f"the robot {robot.name} was not closed: {failed}"
        raise UserError(f"{record.error}. Switch it off by hand.")


def _run(
    connection: RobotConnection,
    act: Callable[[dict[str, Any]], np.ndarray | None],
    safety: Safety,
    record: ControlLog,
    max_steps: int,
    on_observation: Callable[[dict[str, Any]], None],
) -> None:
    period, limits = 1 / record.fps, safety.config
    start = due = last_command = time.monotonic()
    while record.commands < max_steps:
        try:
            observation = connection.observe(limits.stale_s, limits.stale_s)
            if safety.last is None:
                safety.start(observation)
            action = act(observation)
            if action is None:
                record.end = ControlEnd.GUIDE_END
                return
            if (age := time.monotonic() - connection.requested_at) > limits.stale_s:
                raise UnsafeActionError(UnsafeReason.LATE, f"its observation is {age:.2f} s old")
            clipped = Counter(safety.clipped)
            command = safety.clip_or_reject(action)
            for what in safety.clipped - clipped:
                record.event(f"clipped {what}", f"clipped {what}")
            connection.send(command, limits.stale_s)
            on_observation(observation)
            record.commands += 1
            last_command = time.monotonic()
        except RobotError as error:
            record.hold(error.fault, str(error))
            _hold(connection, safety)
        except UnsafeActionError as error:
            record.hold(error.reason, str(error))
            _hold(connection, safety)
        record.steps += 1
        now = time.monotonic()
        record.seconds = now - start
        if now - last_command > limits.stop_after_s:
            raise UserError(
                f"the robot {connection.robot.name} was held still for {now - last_command:.1f} s "
                f"({record.events[-1]['message']}), so control stopped. Check the robot and the policy, then "
                "re-run the command."
            )
        due += period
        if now > due:
            record.missed_deadlines += 1
            record.latest_s = max(record.latest_s, now - due)
            due = now  # no burst of commands to catch up
        time.sleep(max(0.0, due - now))
    record.end = ControlEnd.MAX_STEPS


def _hold(connection: RobotConnection, safety: Safety) -> None:
    still = safety.hold()
    if still is not None and not connection.busy:
        with contextlib.suppress(RobotError):
            connection.send(still, safety.config.stale_s)


@contextlib.contextmanager
def _sigterm_as_exception() -> Generator[None]:
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
def _signals_ignored() -> Generator[None]:
    """Ignore a second Ctrl-C or SIGTERM within the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
