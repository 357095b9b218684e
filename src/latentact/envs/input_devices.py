"""Displays and input devices of a person: a window with keyboard or gamepad, or a terminal."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from latentact.errors import UserError, missing_extra

MOVES = (("a", "d"), ("s", "w"), ("q", "e"), ("f", "r"), ("j", "l"), ("k", "i"), ("g", "t"), ("h", "y"))
"""Keys that decrease and increase each dimension of a continuous action."""
BUTTONS = ("enter", "backspace", "left", "right", "u", "-", "escape", "p")
"""Keys that the buttons of a gamepad stand for, in their order."""


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
        """Wait."""
        ...

    def close(self) -> None:
        """Restore the screen."""
        ...


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
        self._pygame, self._held = pygame, set()
        self._screen: Any = None
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

    def show(self, frame: UInt8[np.ndarray, "h w 3"], text: str) -> None:
        """Display a frame, enlarged to at least 384 pixels, and a line of text below it."""
        pygame = self._pygame
        scale = max(1, math.ceil(384 / min(frame.shape[:2])))
        height, width = frame.shape[0] * scale, frame.shape[1] * scale
        if self._screen is None or self._screen.get_size() != (width, height + 24):
            self._screen = pygame.display.set_mode((width, height + 24))
            pygame.display.set_caption("latentact")
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
        """Wait."""
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
        UserError: standard input is not a terminal.
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
        " ": "space",
    }

    def __init__(self) -> None:
        if not sys.stdin.isatty():
            raise UserError(
                "--device terminal must have an interactive terminal as standard input, got none."
            )
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
        """Wait."""
        time.sleep(seconds)

    def close(self) -> None:
        """Restore the terminal."""
        self._termios.tcsetattr(self._file, self._termios.TCSADRAIN, self._before)
