"""The safety layer between a policy and a robot; no action bypasses it.

Non-finite actions and actions of the wrong shape are rejected. Others are clipped to the limits of each
joint, and then to the maximum change per step from the last command (at first: from the robot's position).
Because the robot must start inside the limits, both hold for every command sent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from latentact.errors import UserError, did_you_mean

VELOCITY = ".vel"
"""Suffix of velocities in LeRobot's names; to hold still, they are set to 0."""


class UnsafeReason(StrEnum):
    """Why an action is rejected."""

    SHAPE = "action of wrong shape"
    NOT_FINITE = "non-finite action"
    LATE = "late action"
    GUIDE = "no fresh latent action"


class ClipCause(StrEnum):
    """Why a joint's command is clipped."""

    LIMIT = "limit"
    STEP = "step"


class UnsafeActionError(Exception):
    """An action was rejected.

    Args:
        reason: kind of violation.
        detail: values for the message.
    """

    def __init__(self, reason: UnsafeReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Limits of a robot; joints by the robot's names, with or without their suffix (`x.pos` or `x`)."""

    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Minimum and maximum command of a joint, in its units."""
    max_step: dict[str, float] = field(default_factory=dict)
    """Maximum change of a joint's command from one step to the next."""
    stale_s: float = 0.5
    """Maximum age of an observation in seconds; with an older one the robot is held still."""
    stop_after_s: float = 2.0
    """Duration of holding still, in seconds, after which control stops."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        for joint, (low, high) in self.limits.items():
            if not low < high:
                raise UserError(
                    f"safety.limits.{joint} must be [min, max], got {[low, high]}. Give two numbers in "
                    "ascending order."
                )
        above = {f"max_step.{joint}": step for joint, step in self.max_step.items()}
        for name, value in {**above, "stale_s": self.stale_s, "stop_after_s": self.stop_after_s}.items():
            if not 0 < value < math.inf:
                raise UserError(
                    f"safety.{name} must be greater than 0 and finite, got {value!r}. Leave it out for the "
                    "default."
                )

    @classmethod
    def from_dict(cls, values: Any) -> SafetyConfig:
        """Return the settings of a YAML file.

        Raises:
            UserError: a name is unknown or a value is invalid.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(values, dict):
            raise UserError(f"safety must be a mapping, got {values!r}. Its keys are {', '.join(names)}.")
        built: dict[str, Any] = {}
        for name, value in values.items():
            if name not in names:
                raise UserError(f"unknown setting 'safety.{name}'{did_you_mean(name, names)}")
            if name not in ("limits", "max_step"):
                built[name] = _number(value, f"safety.{name}")
                continue
            if not isinstance(value, dict):
                raise UserError(
                    f"safety.{name} must map joints to values, got {value!r}. Give a value for each joint."
                )
            read = _pair if name == "limits" else _number
            built[name] = {str(k): read(v, f"safety.{name}.{k}") for k, v in value.items()}
        return cls(**built)


class Safety:
    """Clip or reject the actions of one run.

    Args:
        joints: names of the robot's action, in order.
        config: the limits.

    Raises:
        UserError: the settings name a joint that the robot does not have.
    """

    def __init__(self, joints: Sequence[str], config: SafetyConfig) -> None:
        self.joints, self.config = tuple(joints), config
        self.low, self.high = np.full(len(joints), -np.inf), np.full(len(joints), np.inf)
        self.step = np.full(len(joints), np.inf)
        for joint, (low, high) in config.limits.items():
            self.low[self._joint_index(joint)], self.high[self._joint_index(joint)] = low, high
        for joint, step in config.max_step.items():
            self.step[self._joint_index(joint)] = step
        self.last: np.ndarray | None = None
        """The last command."""
        self.refused: Counter[UnsafeReason] = Counter()
        """Rejected actions, by reason."""
        self.clipped: Counter[str] = Counter()
        """Steps in which a joint was clipped, by joint and `ClipCause`."""

    @property
    def unlimited(self) -> list[str]:
        """Joints without limits."""
        return [
            j for j, low, high in zip(self.joints, self.low, self.high, strict=True) if high - low == np.inf
        ]

    def _joint_index(self, joint: str) -> int:
        exact = [i for i, name in enumerate(self.joints) if name == joint]
        short = [i for i, name in enumerate(self.joints) if name.rpartition(".")[0] == joint]
        if len(found := exact or short) != 1:
            raise UserError(f"the robot has no joint {joint!r}{did_you_mean(joint, self.joints)}")
        return found[0]

    def start(self, observation: Mapping[str, Any]) -> None:
        """Set the robot's position, relative to which the first step is limited.

        Raises:
            UserError: the position is outside the limits, or a joint with a maximum step has no observed
                position.
        """
        at = np.array([self._position(joint, observation) for joint in self.joints])
        for i, joint in enumerate(self.joints):
            if np.isfinite(self.step[i]) and np.isnan(at[i]):
                raise UserError(
                    f"safety.max_step.{joint} needs the joint's position, which the robot does not observe. "
                    "Remove it, or use a robot that reports its positions."
                )
            if at[i] < self.low[i] or at[i] > self.high[i]:
                raise UserError(
                    f"{joint} must be between {self.low[i]:g} and {self.high[i]:g} at the start, got "
                    f"{at[i]:g}. Move the robot inside its limits first."
                )
        self.last = at

    @staticmethod
    def _position(joint: str, observation: Mapping[str, Any]) -> float:
        if joint.endswith(VELOCITY):
            return 0.0
        value: Any = observation.get(joint)
        return float(value) if _is_number(value) else math.nan

    def clip_or_reject(self, action: Any) -> dict[str, float]:
        """Return the command for an action, clipped to limits and maximum steps.

        Args:
            action: a value per joint.

        Raises:
            UnsafeActionError: the action is rejected.
        """
        try:
            target = np.asarray(action, np.float64)
        except (TypeError, ValueError) as error:
            raise self._rejected(UnsafeReason.SHAPE, f"got {type(action).__name__}") from error
        if target.shape != (len(self.joints),):
            detail = f"must be [{len(self.joints)}], got {list(target.shape)}"
            raise self._rejected(UnsafeReason.SHAPE, detail)
        if not np.isfinite(target).all():
            first = int(np.argmin(np.isfinite(target)))
            raise self._rejected(UnsafeReason.NOT_FINITE, f"{self.joints[first]} is {target[first]}")
        safe = self._counted(target, np.clip(target, self.low, self.high), ClipCause.LIMIT)
        if self.last is not None:
            origin = np.where(np.isnan(self.last), safe, self.last)
            near = np.clip(safe, origin - self.step, origin + self.step)
            safe = self._counted(safe, near, ClipCause.STEP)
        self.last = safe
        return dict(zip(self.joints, safe.tolist(), strict=True))

    def hold(self) -> dict[str, float] | None:
        """Return the command that holds the robot still; None while no position is known."""
        if self.last is None or np.isnan(self.last).any():
            return None
        moves = np.array([joint.endswith(VELOCITY) for joint in self.joints])
        self.last = np.where(moves, 0.0, self.last)
        return dict(zip(self.joints, self.last.tolist(), strict=True))

    def _counted(self, before: np.ndarray, after: np.ndarray, cause: ClipCause) -> np.ndarray:
        for i in np.flatnonzero(before != after):
            self.clipped[f"{self.joints[i]} {cause}"] += 1
        return after

    def _rejected(self, reason: UnsafeReason, detail: str) -> UnsafeActionError:
        self.refused[reason] += 1
        return UnsafeActionError(reason, detail)


def _number(value: Any, name: str) -> float:
    if not _is_number(value):
        raise UserError(f"{name} must be a finite number, got {value!r}. Correct it in the robot's file.")
    return float(value)


def _pair(value: Any, name: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{name} must be [min, max], got {value!r}. Give two numbers.")
    return _number(value[0], name), _number(value[1], name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
