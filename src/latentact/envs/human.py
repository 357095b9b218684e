"""A person as the actor of an environment: by keyboard or gamepad in a window, or in a terminal.

Keys that control the recording are those of `lerobot-record` (right, left, escape), and those that it lacks.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from latentact.envs.spec import EnvSpec
from latentact.errors import UserError, missing_extra
from latentact.types import ActionSpace

MOVES = (("a", "d"), ("s", "w"), ("q", "e"), ("f", "r"), ("j", "l"), ("k", "i"), ("g", "t"), ("h", "y"))
"""Keys that decrease and increase each dimension of a continuous action."""
CLASSES = "0123456789zxcvbnm"
"""Keys of the classes of a discrete action, in their order."""
NAMES = {"left": "a", "right": "d", "up": "w", "forward": "w", "down": "s", "backward": "s"}
"""Further keys of classes with these names."""
BUTTONS = ("enter", "backspace", "left", "right", "u", "-", "escape", "p")
"""Keys that the buttons of a gamepad stand for, in their order."""
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
}
"""Keys that control the recording, and what they do."""


@runtime_checkable
class Device(Protocol):
    """Display and input device."""

    step_by_step: bool
    """Whether keys are never held, so that the environment waits for each."""

    def show(self, frame: UInt8[np.ndarray, "h w 3"], text: str) -> None:
        """Display a frame and a line of text."""
        ...

    def poll(self) -> list[str]:
        """Return the names of the keys that were pressed since the last call."""
        ...

    def held(self) -> set[str]:
        """Return the names of the keys that are held."""
        ...

    def axes(self) -> list[float]:
        """Return the deflections of a gamepad's sticks, each from -1 to 1."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait for so long."""
        ...

    def close(self) -> None:
        """Restore the screen."""
        ...


class Human:
    """The actor of `run_episodes`: one person who acts in one environment.

    Args:
        device: what the person uses.
        spec: environment.
        low: smallest value of each dimension of a continuous action, [a].
        high: largest values.
        realtime: whether a discrete environment goes on without a key.
        stroke: change of a continuous action by a held key, as a fraction of its range.
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
        stroke: float = 0.05,
        on_undo: Callable[[], str] = lambda: "",
    ) -> None:
        self.device, self.spec, self.low, self.high = device, spec, low, high
        self.waits = device.step_by_step or (spec.action_space.discrete and not realtime)
        self.stroke, self.on_undo = stroke, on_undo
        self.relative = bool(np.all(low == -high))
        """Whether actions are changes, which are 0 without a key; else a key moves the last action on."""
        self.speed = 1.0
        """Steps per second, relative to the environment's rate."""
        self.outcome: Outcome | None = None
        """How the person ended the episode; None: the environment ended it."""
        self.title = ""
        """Text before the number of the step."""
        self._classes = class_keys(spec.action_space, spec.action_names)
        self._queue: list[str] = []

    def reset(self, num_envs: int) -> None:
        """Start an episode."""
        self.outcome, self._step, self._paused, self._note = None, 0, False, ""
        self._due = time.monotonic()
        self._last: Any = None

    def act(self, observation: dict[str, Any]) -> Sequence[Any]:
        """Return the person's action once there is one; None ends the episode.

        Args:
            observation: of one environment.
        """
        frame = observation[self.spec.camera][0]
        state = observation.get("observation.state")
        if self._last is None:
            self._last = self._rest(None if state is None else state[0])
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
                if self.waits and not self._paused and (action := self._action({key}, [])) is not None:
                    return [self._taken(action)]
                pressed.add(key)
            now = time.monotonic()
            if not self.waits and not self._paused and now >= self._due:
                self._due = max(self._due + 1 / (self.spec.fps * self.speed), now)
                action = self._action(self.device.held() | pressed, self.device.axes())
                return [self._taken(self._idle() if action is None else action)]
            self.device.wait(0.02 if self.waits or self._paused else min(0.02, self._due - now))

    def _control(self, key: str) -> None:
        if key == "p":
            self._paused, self._due = not self._paused, time.monotonic()
        elif key == "u":
            self._note = f"| {self.on_undo()}"
        elif key in ("+", "-"):
            self.speed *= 1.25 if key == "+" else 0.8
            self._note = f"| speed {self.speed:.2f}"

    def _taken(self, action: Any) -> Any:
        self._step += 1
        self._last = action
        return action

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
        step = way * self.stroke * np.where(finite, self.high - self.low, 1.0)
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


class Window:
    """A pygame window; a gamepad is optional.

    Args:
        gamepad: whether to read a gamepad besides the keyboard.

    Raises:
        UserError: pygame is missing, there is no display, or no gamepad.
    """

    step_by_step = False

    def __init__(self, gamepad: bool = False) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        try:
            import pygame
        except ModuleNotFoundError as error:
            raise missing_extra("pygame", "envs") from error
        self._pygame, self._held, self._screen = pygame, set(), None
        try:
            pygame.display.init()
            pygame.font.init()
        except pygame.error as error:
            raise UserError(
                f"a window needs a display ({error}). Use --device terminal, or start one, as with xvfb-run."
            ) from error
        self._font = pygame.font.Font(None, 18)
        self._pad: Any = None
        if gamepad:
            pygame.joystick.init()
            if not pygame.joystick.get_count():
                raise UserError(
                    "a gamepad must be connected, got none. Connect it, or use --device keyboard."
                )
            self._pad = pygame.joystick.Joystick(0)
            self._pad.init()

    def show(self, frame: UInt8[np.ndarray, "h w 3"], text: str) -> None:
        """Display a frame, enlarged to at least 384 pixels, and a line of text below it."""
        pygame = self._pygame
        scale = max(1, math.ceil(384 / min(frame.shape[:2])))
        height, width = frame.shape[0] * scale, frame.shape[1] * scale
        if self._screen is None or self._screen.get_size() != (width, height + 24):
            self._screen = pygame.display.set_mode((width, height + 24))
            pygame.display.set_caption("latentact record")
        surface = pygame.surfarray.make_surface(np.ascontiguousarray(frame.swapaxes(0, 1)))
        self._screen.fill((16, 16, 20))
        self._screen.blit(pygame.transform.scale(surface, (width, height)), (0, 0))
        self._screen.blit(self._font.render(text, True, (235, 235, 235)), (6, height + 5))
        pygame.display.flip()

    def poll(self) -> list[str]:
        """Return the keys that were pressed; closing the window counts as escape."""
        pygame, pressed = self._pygame, []
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                pressed.append("escape")
            elif event.type in (pygame.KEYDOWN, pygame.KEYUP):
                name = _key_name(pygame, event)
                if event.type == pygame.KEYDOWN:
                    pressed.append(name)
                    self._held.add(name)
                else:
                    self._held.discard(name)
            elif event.type == pygame.JOYBUTTONDOWN and event.button < len(BUTTONS):
                pressed.append(BUTTONS[event.button])
            elif event.type == pygame.JOYHATMOTION:
                for value, keys in zip(event.value, MOVES, strict=False):
                    for sign, key in zip((-1, 1), keys, strict=True):
                        (self._held.add if value == sign else self._held.discard)(key)
                        pressed += [key] if value == sign else []
        return pressed

    def held(self) -> set[str]:
        """Return the keys that are held."""
        return set(self._held)

    def axes(self) -> list[float]:
        """Return the sticks; up and right are positive."""
        if self._pad is None:
            return []
        values = [self._pad.get_axis(i) for i in range(self._pad.get_numaxes())]
        return [-value if i % 2 else value for i, value in enumerate(values)]

    def wait(self, seconds: float) -> None:
        """Wait for so long."""
        time.sleep(seconds)

    def close(self) -> None:
        """Close the window."""
        self._pygame.display.quit()


def _key_name(pygame: Any, event: Any) -> str:
    named = {
        pygame.K_RETURN: "enter",
        pygame.K_KP_ENTER: "enter",
        pygame.K_BACKSPACE: "backspace",
        pygame.K_ESCAPE: "escape",
        pygame.K_LEFT: "left",
        pygame.K_RIGHT: "right",
        pygame.K_EQUALS: "+",
        pygame.K_PLUS: "+",
        pygame.K_KP_PLUS: "+",
        pygame.K_MINUS: "-",
        pygame.K_KP_MINUS: "-",
    }
    return named.get(event.key) or pygame.key.name(event.key)


class Terminal:
    """A terminal: frames as colored blocks, one step per key.

    Raises:
        UserError: standard input is no terminal.
    """

    step_by_step = True
    _SEQUENCES = {  # noqa: RUF012
        "\x1b[C": "right",
        "\x1b[D": "left",
        "\x1b": "escape",
        "\n": "enter",
        "\r": "enter",
        "\x7f": "backspace",
        "\x08": "backspace",
    }

    def __init__(self) -> None:
        if not sys.stdin.isatty():
            raise UserError("--device terminal must be used in a terminal, got another standard input.")
        import termios
        import tty

        self._termios, self._file = termios, sys.stdin.fileno()
        self._before = termios.tcgetattr(self._file)
        tty.setcbreak(self._file, termios.TCSADRAIN)
        self._shown: tuple[bytes, str] | None = None
        sys.stdout.write("\x1b[2J")

    def show(self, frame: UInt8[np.ndarray, "h w 3"], text: str) -> None:
        """Print a frame of at most 64 columns, two pixels a character, and a line of text."""
        if self._shown == (shown := (frame.tobytes(), text)):
            return
        self._shown = shown
        scale = max(1, math.ceil(frame.shape[1] / 64))
        small = frame[::scale, ::scale]
        small = small[: len(small) // 2 * 2]
        lines = [
            "".join(
                f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
                for a, b in zip(top, bottom, strict=True)
            )
            for top, bottom in zip(small[::2].tolist(), small[1::2].tolist(), strict=True)
        ]
        sys.stdout.write("\x1b[H" + "\x1b[0m\n".join(lines) + f"\x1b[0m\n{text}\x1b[K\n")
        sys.stdout.flush()

    def poll(self) -> list[str]:
        """Return the keys that were pressed."""
        import select

        text = ""
        while select.select([self._file], [], [], 0)[0]:
            text += os.read(self._file, 64).decode(errors="ignore")
        keys = []
        while text:
            found = next((name for name in self._SEQUENCES if text.startswith(name)), text[0])
            keys.append(self._SEQUENCES.get(found, found))
            text = text[len(found) :]
        return keys

    def held(self) -> set[str]:
        """Return no keys."""
        return set()

    def axes(self) -> list[float]:
        """Return no sticks."""
        return []

    def wait(self, seconds: float) -> None:
        """Wait for so long."""
        time.sleep(seconds)

    def close(self) -> None:
        """Restore the terminal."""
        self._termios.tcsetattr(self._file, self._termios.TCSADRAIN, self._before)
