"""A person as the actor of an environment, alone or by taking over a policy.

Keys that control the recording are those of `lerobot-record` (right, left, escape), and those that it lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from latentact.envs.episode import Actor
from latentact.envs.input_devices import MOVES, Device
from latentact.envs.spec import EnvSpec
from latentact.errors import UserError
from latentact.types import ActionSpace

CLASSES = "0123456789zxcvbnm"
"""Keys of the classes of a discrete action, in their order."""
NAMES = {"left": "a", "right": "d", "up": "w", "forward": "w", "down": "s", "backward": "s"}
"""Further keys of classes with these names."""
DEAD_ZONE = 0.15
"""Deflection of a gamepad's stick below which it is at rest."""


class Outcome(StrEnum):
    """How a person ended an episode."""

    END = "right"
    SUCCESS = "enter"
    FAILURE = "backspace"
    AGAIN = "left"
    STOP = "escape"


HELP = {
    Outcome.END: "end the episode",
    Outcome.SUCCESS: "end it as a success",
    Outcome.FAILURE: "end it as a failure",
    Outcome.AGAIN: "discard it and record it again",
    Outcome.STOP: "stop recording",
    "p": "pause",
    "u": "undo the last episode",
    "+": "faster",
    "-": "slower",
    "space": "let the policy act (in a terminal)",
}
"""Keys that control the recording, and what they do."""


class Human:
    """The actor of `run_episodes`: one person who acts in one environment.

    Args:
        device: what the person uses.
        spec: environment.
        low: smallest value of each dimension of a continuous action, [a].
        high: largest values.
        realtime: whether a discrete environment steps without waiting for a key, as it does with a policy.
        policy: what acts while no key is pressed; in a terminal, when space is pressed.
        step_size: change of a continuous action by a held key, as a fraction of its range.
        on_undo: called when the person undoes the last episode; returns what to display.
    """

    def __init__(
        self,
        device: Device,
        spec: EnvSpec,
        low: np.ndarray,
        high: np.ndarray,
        *,
        realtime: bool = False,
        policy: Actor | None = None,
        step_size: float = 0.05,
        on_undo: Callable[[], str] = lambda: "",
    ) -> None:
        self.device, self.spec, self.low, self.high = device, spec, low, high
        self.waits = device.step_by_step or (spec.action_space.discrete and not realtime and policy is None)
        self.policy, self.step_size, self.on_undo = policy, step_size, on_undo
        self.relative = bool(np.all(low == -high))
        """Whether actions are changes, which are 0 without a key; else a key moves the last action on."""
        self.speed = 1.0
        """Steps per second, relative to the environment's rate."""
        self.outcome: Outcome | None = None
        """How the person ended the episode; None: the environment ended it."""
        self.interventions: list[bool] = []
        """Whether each action of the episode is the person's."""
        self.title = ""
        """Text before the number of the step."""
        self._classes = class_keys(spec.action_space, spec.action_names)
        self._queue: list[str] = []

    def reset(self, num_envs: int) -> None:
        """Start an episode."""
        self.outcome, self._step, self._paused, self._note = None, 0, False, ""
        self._due = time.monotonic()
        self._last: Any = None
        self.interventions = []
        if self.policy is not None:
            self.policy.reset(num_envs)

    def act(self, observation: dict[str, Any]) -> Sequence[Any]:
        """Return the person's action once there is one; None ends the episode.

        Args:
            observation: of one environment.
        """
        frame = observation[self.spec.camera][0]
        state = observation.get("observation.state")
        if self._last is None:
            self._last = self._rest(None if state is None else state[0])
        own = None if self.policy is None else self.policy.act(observation)[0]
        task = f"{observation['task'][0]} | " if observation.get("task", [""])[0] else ""
        while True:
            paused = " | paused" if self._paused else ""
            text = f"{task}{self.title} | step {self._step}{paused} {self._note}"
            self.device.show(frame, text)
            self._queue += self.device.poll()
            pressed = set()
            while self._queue:
                key = self._queue.pop(0)
                if key in [*Outcome]:
                    self.outcome = Outcome(key)
                    return [None]
                self._control(key)
                action = self._action({key}, [])
                if (
                    self.waits
                    and not self._paused
                    and (action is not None or (key == "space" and own is not None))
                ):
                    return [self._taken(action, own)]
                pressed.add(key)
            now = time.monotonic()
            if not self.waits and not self._paused and now >= self._due:
                self._due = max(self._due + 1 / (self.spec.fps * self.speed), now)
                action = self._action(self.device.held() | pressed, self.device.axes())
                return [self._taken(action, self._idle() if own is None else own)]
            self.device.wait(0.02 if self.waits or self._paused else min(0.02, self._due - now))

    def _control(self, key: str) -> None:
        if key == "p":
            self._paused, self._due = not self._paused, time.monotonic()
        elif key == "u":
            self._note = f"| {self.on_undo()}"
        elif key in ("+", "-"):
            self.speed *= 1.25 if key == "+" else 0.8
            self._note = f"| speed {self.speed:.2f}"

    def _taken(self, action: Any, otherwise: Any) -> Any:
        """Return the person's action, or the other one without one."""
        self.interventions.append(action is not None)
        self._step += 1
        self._last = otherwise if action is None else action
        return self._last

    def _rest(self, state: np.ndarray | None) -> Any:
        """Return the action before the first key."""
        if self.spec.action_space.discrete:
            hold = self.spec.hold
            return min(self._classes.values()) if hold is None else hold
        if self.relative or not np.isfinite([self.low, self.high]).all():
            return np.zeros_like(self.low)
        if state is not None and len(state) >= len(self.low):
            at = state[: len(self.low)]
            if np.all((self.low <= at) & (at <= self.high)):
                return at.astype(np.float32)
        return ((self.low + self.high) / 2).astype(np.float32)

    def _idle(self) -> Any:
        """Return the action without a key."""
        if self.spec.action_space.discrete:
            return self._last if self.spec.hold is None else self.spec.hold
        return np.zeros_like(self.low) if self.relative else self._last

    def _action(self, keys: set[str], axes: Sequence[float]) -> Any:
        """Return the action of held keys and sticks; None without any."""
        if self.spec.action_space.discrete:
            return next((self._classes[key] for key in sorted(keys) if key in self._classes), None)
        way = np.zeros(len(self.low), np.float32)
        for i, (less, more) in enumerate(MOVES[: len(way)]):
            way[i] += (more in keys) - (less in keys)
        for i, value in enumerate([*axes][: len(way)]):
            way[i] += value if abs(value) >= DEAD_ZONE else 0.0
        if not way.any():
            return None
        finite = np.isfinite(self.high) & np.isfinite(self.low)
        if self.relative:
            return np.clip(way * np.where(finite, self.high, 1.0), self.low, self.high).astype(np.float32)
        if len(way) > 1:  # positions on the screen, where y grows downwards
            way[1] = -way[1]
        step = way * self.step_size * np.where(finite, self.high - self.low, 1.0)
        return np.clip(self._last + step, self.low, self.high).astype(np.float32)


def class_keys(space: ActionSpace, names: Sequence[str]) -> dict[str, int]:
    """Return the class of each key: digits and letters in their order, and the keys of known names.

    Raises:
        UserError: there are more classes than keys.
    """
    if not space.discrete:
        return {}
    if space.size > len(CLASSES):
        raise UserError(
            f"a discrete action must have at most {len(CLASSES)} classes to be recorded by keys, got "
            f"{space.size}. Record it with another program."
        )
    values = [*(space.values or range(space.size))]
    keys = {NAMES[name]: value for name, value in zip(names, values, strict=False) if name in NAMES}
    return keys | dict(zip(CLASSES, values, strict=False))


def describe_keys(spec: EnvSpec) -> list[str]:
    """Return lines that explain the keys of an environment."""
    if spec.action_space.discrete:
        keys = class_keys(spec.action_space, spec.action_names)
        values = [*(spec.action_space.values or range(spec.action_space.size))]
        names = dict(zip(values, spec.action_names, strict=False))
        lines = [f"{key}: {names.get(value, value)}" for key, value in keys.items()]
    else:
        pairs = zip(MOVES, spec.action_names, strict=False)
        lines = [f"{less} / {more}: {name} - / +" for (less, more), name in pairs]
    return [", ".join(lines), ", ".join(f"{key}: {what}" for key, what in HELP.items())]
