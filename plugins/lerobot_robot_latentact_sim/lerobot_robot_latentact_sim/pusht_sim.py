"""PushT (Chi et al., 2023) as a robot: a finger on a table, commanded by positions."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
from lerobot.robots import Robot
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

from latentact.envs.spec import make_env
from lerobot_robot_latentact_sim.config_pusht_sim import PushTSimConfig

JOINTS = ("x.pos", "y.pos")
STEP_S = 0.1
"""Seconds per simulation step."""


class PushTSim(Robot):
    """Observes the finger's position (0..512, pixels of the world) and an image from above; moves the finger.

    Args:
        config: settings.
    """

    config_class = PushTSimConfig
    name = "pusht_sim"

    def __init__(self, config: PushTSimConfig) -> None:
        super().__init__(config)
        self.config = config
        self.sent: list[dict[str, float]] = []
        """All commands, in order."""
        self.best = 0.0
        """Largest fraction of the goal covered by the block."""
        self._env: Any = None

    @property
    def observation_features(self) -> dict[str, Any]:
        """Two positions and an image."""
        return {**self.action_features, "top": (self.config.image_size, self.config.image_size, 3)}

    @property
    def action_features(self) -> dict[str, type]:
        """Target position of the finger."""
        return dict.fromkeys(JOINTS, float)

    @property
    def is_connected(self) -> bool:
        """Whether the simulation is running."""
        return self._env is not None

    @property
    def is_calibrated(self) -> bool:
        """True: calibration is not needed."""
        return True

    def connect(self, calibrate: bool = True) -> None:
        """Start the simulation from the seed's start positions."""
        if self.is_connected:
            raise DeviceAlreadyConnectedError(f"{self} is already connected")
        self._env = make_env("pusht", resolution=self.config.image_size)
        self._observation, _ = self._env.reset(seed=self.config.seed)
        self._goal = self._observation["agent_pos"].astype(np.float32)
        self._observed, self._clock = 0, time.monotonic()

    def calibrate(self) -> None:
        """Do nothing."""

    def configure(self) -> None:
        """Do nothing."""

    def get_observation(self) -> dict[str, Any]:
        """Return the finger's position and the image."""
        self._require_connection()
        self._observed += 1
        fault = self.config.fault if self._observed > self.config.fault_after else "none"
        if fault == "block":
            threading.Event().wait()
        if fault == "raise":
            raise ConnectionError("the simulated robot does not respond")
        if self.config.realtime:
            self._catch_up()
        x, y = (float(value) for value in self._observation["agent_pos"])
        observation = {"x.pos": x, "y.pos": y, "top": self._observation["pixels"]}
        if fault == "nan":
            observation["x.pos"] = float("nan")
        if fault == "drop":
            del observation["top"]
        return observation

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Set the finger's target position."""
        self._require_connection()
        command = {joint: float(action[joint]) for joint in JOINTS}
        self.sent.append(command)
        self._goal = np.array([command[joint] for joint in JOINTS], np.float32)
        if self.config.realtime:
            self._catch_up()
        else:
            self._step()
        return command

    def disconnect(self) -> None:
        """Stop the simulation."""
        self._require_connection()
        self._env.close()
        self._env = None

    def _step(self) -> None:
        self._observation, _, _, _, info = self._env.step(self._goal)
        self.best = max(self.best, float(info["coverage"]))

    def _catch_up(self) -> None:
        while time.monotonic() - self._clock >= STEP_S:
            self._clock += STEP_S
            self._step()

    def _require_connection(self) -> None:
        if not self.is_connected:
            raise DeviceNotConnectedError(f"{self} is not connected")
