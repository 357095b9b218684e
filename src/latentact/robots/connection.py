"""The connection to a robot: every call in a thread of its own, with a time limit."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import numpy as np

from latentact.errors import UserError

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


class RobotTimeoutError(Exception):
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
            raise RobotTimeoutError(f"it does not answer while {doing}") from None
        if error is not None:
            raise RobotTimeoutError(f"{doing} failed: {_one_line(error)}")
        return future.result()

    def connect(self) -> None:
        """Connect.

        Raises:
            UserError: it cannot be connected.
        """
        try:
            self._answer(self._submit(self.robot.connect), CONNECT_S, "connecting")
        except RobotTimeoutError as error:
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
            raise RobotTimeoutError(f"an observation is {age:.2f} s old")
        self._check(observation)
        return observation

    def _check(self, observation: Any) -> None:
        for name, kind in self.robot.observation_features.items():
            value = observation.get(name) if isinstance(observation, Mapping) else None
            if value is None:
                raise RobotTimeoutError(f"the observation lacks {name}")
            if isinstance(kind, tuple):
                if tuple(value.shape) != tuple(kind) or value.dtype != np.uint8:
                    raise RobotTimeoutError(f"the picture {name} is {value.dtype} {list(value.shape)}")
            elif not math.isfinite(value):
                raise RobotTimeoutError(f"the observed {name} is {value}")

    def send(self, command: dict[str, float], timeout: float) -> None:
        """Send a command that the safety layer made."""
        if self.busy:
            raise RobotTimeoutError("it does not answer")
        self._answer(self._submit(self.robot.send_action, command), timeout, "acting")

    def close(self, hold: dict[str, float] | None) -> str:
        """Make the robot hold still where it answers, and disconnect it in any case; returns what failed."""
        failed = []
        if hold is not None and not self.busy:
            try:
                self.send(hold, 1.0)
            except RobotTimeoutError as error:
                failed.append(str(error))
        if self.busy:  # the thread hangs in the driver: disconnect beside it
            threading.Thread(target=self._work, name="robot", daemon=True).start()
        try:
            self._answer(self._submit(self._disconnect), DISCONNECT_S, "disconnecting")
            self.closed = True
        except RobotTimeoutError as error:
            failed.append(str(error))
        return "; ".join(failed)

    def _disconnect(self) -> None:
        if self.robot.is_connected:
            self.robot.disconnect()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
