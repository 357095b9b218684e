"""The connection to a robot: every driver call runs on a separate thread, with a time limit."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np

from latentact.errors import UserError

DISCONNECT_S = 5.0
"""Time limit for disconnecting, in seconds."""
CONNECT_S = 120.0
"""Time limit for connecting, in seconds; some robots calibrate while connecting."""


@runtime_checkable
class Robot(Protocol):
    """The part of LeRobot's `Robot` interface that is used."""

    name: str

    @property
    def observation_features(self) -> dict[str, Any]:
        """Name -> float, or the shape of an image."""
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
        """Connect."""
        ...

    def get_observation(self) -> dict[str, Any]:
        """Return the current observation."""
        ...

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Send a command."""
        ...

    def disconnect(self) -> None:
        """Disconnect."""
        ...


class RobotFault(StrEnum):
    """How a call to a robot failed."""

    TIMEOUT = "robot timeout"
    DRIVER = "robot driver error"
    STALE = "stale observation"
    OBSERVATION = "invalid observation"


class RobotError(Exception):
    """A call to the robot failed.

    Args:
        fault: kind of failure.
        message: details for the user.
    """

    def __init__(self, fault: RobotFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class RobotTimeoutError(RobotError):
    """A call to the robot did not return in time."""

    def __init__(self, message: str) -> None:
        super().__init__(RobotFault.TIMEOUT, message)


class RobotConnection:
    """The only access to the robot: each driver call runs on one thread, with a time limit.

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
        self.requested_at = 0.0
        """Time of the last request for an observation, on the monotonic clock."""
        self.closed = False
        """Whether it was disconnected."""
        threading.Thread(target=self._work, name="robot", daemon=True).start()

    def _work(self) -> None:
        while True:
            future, call, arguments = self._calls.get()
            try:
                future.set_result(call(*arguments))
            except BaseException as error:  # passed to the waiting thread, as concurrent.futures does
                future.set_exception(error)

    @property
    def busy(self) -> bool:
        """Whether a call has not returned."""
        return self._last is not None and not self._last.done()

    def _submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        self._last = Future()
        self._calls.put((self._last, call, arguments))
        return self._last

    def _result(self, future: Future, timeout: float, doing: str) -> Any:
        try:
            error = future.exception(timeout)
        except TimeoutError:
            raise RobotTimeoutError(f"no response while {doing}") from None
        if error is not None:
            raise RobotError(RobotFault.DRIVER, f"{doing} failed: {one_line(error)}")
        return future.result()

    def connect(self) -> None:
        """Connect.

        Raises:
            UserError: the robot cannot be connected.
        """
        try:
            self._result(self._submit(self.robot.connect), CONNECT_S, "connecting")
        except RobotError as error:
            raise UserError(
                f"the robot {self.robot.name} cannot be used: {error}. Check its connection and settings."
            ) from error

    def observe(self, timeout: float, stale_s: float) -> dict[str, Any]:
        """Return a complete, finite observation that was requested less than `stale_s` ago.

        Raises:
            RobotError: no such observation is available.
        """
        if self._reading is None:
            self._reading = time.monotonic(), self._submit(self.robot.get_observation)
        self.requested_at, future = self._reading
        try:
            observation = self._result(future, timeout, "observing")
        finally:
            if future.done():
                self._reading = None
        if (age := time.monotonic() - self.requested_at) > stale_s:
            raise RobotError(RobotFault.STALE, f"the observation is {age:.2f} s old")
        self._check(observation)
        return observation

    def _check(self, observation: Any) -> None:
        def invalid(message: str) -> RobotError:
            return RobotError(RobotFault.OBSERVATION, message)

        for name, kind in self.robot.observation_features.items():
            value = observation.get(name) if isinstance(observation, Mapping) else None
            if value is None:
                raise invalid(f"the observation lacks {name}")
            if isinstance(kind, tuple):
                if tuple(value.shape) != tuple(kind) or value.dtype != np.uint8:
                    raise invalid(
                        f"the image {name} must be uint8 {list(kind)}, got {value.dtype} {list(value.shape)}"
                    )
            elif not math.isfinite(value):
                raise invalid(f"the observed {name} must be finite, got {value}")

    def send(self, command: dict[str, float], timeout: float) -> None:
        """Send a command of the safety layer.

        Raises:
            RobotError: the command was not sent.
        """
        if self.busy:
            raise RobotTimeoutError("no response")
        self._result(self._submit(self.robot.send_action, command), timeout, "acting")

    def close(self, hold: dict[str, float] | None) -> str:
        """Send a last command to hold still if the robot responds, disconnect it, and return the errors."""
        failed = []
        if hold is not None and not self.busy:
            try:
                self.send(hold, 1.0)
            except RobotError as error:
                failed.append(str(error))
        if self.busy:  # the thread hangs in the driver: disconnect on another one
            threading.Thread(target=self._work, name="robot", daemon=True).start()
        try:
            self._result(self._submit(self._disconnect), DISCONNECT_S, "disconnecting")
            self.closed = True
        except RobotError as error:
            failed.append(str(error))
        return "; ".join(failed)

    def _disconnect(self) -> None:
        if self.robot.is_connected:
            self.robot.disconnect()


def one_line(error: BaseException) -> str:
    """Return an exception as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
