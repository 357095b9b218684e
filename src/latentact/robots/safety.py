"""The safety layer: between a policy and a robot, and no action goes around it.

Numbers that are not finite, and actions of another shape, are refused. What is left is clipped to the limits
of each joint, and then to the largest change per step from the last command (at first: from where the robot
stands). Because the start must lie inside the limits, both hold for every command ever sent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentact.errors import UserError, did_you_mean

VELOCITY = ".vel"
"""How LeRobot's names of velocities end: to hold still is to command 0 there."""


class UnsafeActionError(Exception):
    """An action that is not passed on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """What a robot may do; joints by the robot's names, with or without their ending (`x.pos` or `x`)."""

    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Smallest and largest command of a joint, in its units."""
    max_step: dict[str, float] = field(default_factory=dict)
    """Largest change of a joint's command from one step to the next."""
    stale_s: float = 0.5
    """Age in seconds from which an observation is not acted on: the robot holds still instead."""
    stop_after_s: float = 2.0
    """Seconds of holding still after which control stops."""

    def __post_init__(self) -> None:
        """Refuse limits that are none."""
        for joint, (low, high) in self.limits.items():
            if not low < high:
                raise UserError(f"safety.limits.{joint} is {[low, high]}; wanted [smallest, largest].")
        above = {f"max_step.{joint}": step for joint, step in self.max_step.items()}
        for name, value in {**above, "stale_s": self.stale_s, "stop_after_s": self.stop_after_s}.items():
            if not 0 < value < math.inf:
                raise UserError(f"safety.{name} is {value!r}; wanted a number above 0.")

    @classmethod
    def from_dict(cls, values: Any) -> SafetyConfig:
        """Return the settings that a YAML file gives.

        Raises:
            UserError: a name is unknown or a value is none.
        """
        if not isinstance(values, dict):
            raise UserError(f"safety is {values!r}; wanted limits, max_step, stale_s and stop_after_s.")
        built: dict[str, Any] = {}
        for name, value in values.items():
            if name not in cls.__dataclass_fields__:
                raise UserError(
                    f"unknown setting 'safety.{name}'{did_you_mean(name, cls.__dataclass_fields__)}"
                )
            if name not in ("limits", "max_step"):
                built[name] = _number(value, f"safety.{name}")
                continue
            if not isinstance(value, dict):
                raise UserError(f"safety.{name} is {value!r}; wanted a value for each joint.")
            number = _pair if name == "limits" else _number
            built[name] = {str(k): number(v, f"safety.{name}.{k}") for k, v in value.items()}
        return cls(**built)


class Safety:
    """Checks and clips the actions of one run.

    Args:
        joints: names of the robot's action, in order.
        config: what it may do.

    Raises:
        UserError: the settings name a joint that the robot does not have.
    """

    def __init__(self, joints: Sequence[str], config: SafetyConfig) -> None:
        self.joints, self.config = tuple(joints), config
        self.low, self.high = np.full(len(joints), -np.inf), np.full(len(joints), np.inf)
        self.step = np.full(len(joints), np.inf)
        for joint, (low, high) in config.limits.items():
            self.low[self._place(joint)], self.high[self._place(joint)] = low, high
        for joint, step in config.max_step.items():
            self.step[self._place(joint)] = step
        self.last: np.ndarray | None = None
        """The last command."""
        self.refused: Counter[str] = Counter()
        """Refused actions by reason."""
        self.clipped: Counter[str] = Counter()
        """Steps in which a joint was clipped, by joint and cause (limit or step)."""

    @property
    def unlimited(self) -> list[str]:
        """Joints without limits."""
        return [
            j for j, low, high in zip(self.joints, self.low, self.high, strict=True) if high - low == np.inf
        ]

    def _place(self, joint: str) -> int:
        whole = [i for i, name in enumerate(self.joints) if name == joint]
        short = [i for i, name in enumerate(self.joints) if name.rpartition(".")[0] == joint]
        if len(found := whole or short) != 1:
            raise UserError(f"the robot has no joint {joint!r}{did_you_mean(joint, self.joints)}")
        return found[0]

    def start(self, observation: Mapping[str, Any]) -> None:
        """Take the robot's position as the one from which the first step is counted.

        Raises:
            UserError: it stands outside the limits, or does not say where a joint with a largest step is.
        """
        at = np.array([self._present(joint, observation) for joint in self.joints])
        for i, joint in enumerate(self.joints):
            if np.isfinite(self.step[i]) and np.isnan(at[i]):
                raise UserError(
                    f"safety.max_step is set for {joint} and the robot does not observe where that is; "
                    "remove it, or use a robot that reports its positions."
                )
            if at[i] < self.low[i] or at[i] > self.high[i]:
                raise UserError(
                    f"the robot stands at {joint} = {at[i]:g}, outside its limits {self.low[i]:g} to "
                    f"{self.high[i]:g}; move it inside first."
                )
        self.last = at

    @staticmethod
    def _present(joint: str, observation: Mapping[str, Any]) -> float:
        if joint.endswith(VELOCITY):
            return 0.0
        value: Any = observation.get(joint)
        return float(value) if _is_number(value) else math.nan

    def admit(self, action: Any) -> dict[str, float]:
        """Return the command for the robot.

        Args:
            action: a number per joint.

        Raises:
            UnsafeActionError: it is refused.
        """
        try:
            wanted = np.asarray(action, np.float64)
        except (TypeError, ValueError) as error:
            raise self._refusal("action of another shape", f"it is {type(action).__name__}") from error
        if wanted.shape != (len(self.joints),):
            said = f"it has shape {list(wanted.shape)}, the robot {len(self.joints)} joints"
            raise self._refusal("action of another shape", said)
        if not np.isfinite(wanted).all():
            bad = self.joints[int(np.argmin(np.isfinite(wanted)))]
            raise self._refusal("action not finite", f"{bad} is {wanted[~np.isfinite(wanted)][0]}")
        safe = self._counted(wanted, np.clip(wanted, self.low, self.high), "limit")
        if self.last is not None:
            from_here = np.where(np.isnan(self.last), safe, self.last)
            near = np.clip(safe, from_here - self.step, from_here + self.step)
            safe = self._counted(safe, near, "step")
        self.last = safe
        return dict(zip(self.joints, safe.tolist(), strict=True))

    def hold(self) -> dict[str, float] | None:
        """Return the command that keeps the robot still; None while it was never told a position."""
        if self.last is None or np.isnan(self.last).any():
            return None
        moves = np.array([joint.endswith(VELOCITY) for joint in self.joints])
        self.last = np.where(moves, 0.0, self.last)
        return dict(zip(self.joints, self.last.tolist(), strict=True))

    def _counted(self, before: np.ndarray, after: np.ndarray, cause: str) -> np.ndarray:
        for i in np.flatnonzero(before != after):
            self.clipped[f"{self.joints[i]} {cause}"] += 1
        return after

    def _refusal(self, reason: str, said: str) -> UnsafeActionError:
        self.refused[reason] += 1
        return UnsafeActionError(f"{reason}: {said}")


def _number(value: Any, name: str) -> float:
    if not _is_number(value):
        raise UserError(f"{name} is {value!r}; wanted a number.")
    return float(value)


def _pair(value: Any, name: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{name} is {value!r}; wanted [smallest, largest].")
    return _number(value[0], name), _number(value[1], name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
