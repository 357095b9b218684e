"""A robot from a YAML file: the LeRobot robot, its limits and its cameras; and a camera from one line.

robot: {type: so101_follower, port: /dev/ttyACM0, cameras: {...}}   # as on LeRobot's command line
cameras: {front: observation.images.top}                            # robot's name -> policy's key
safety:
  limits: {shoulder_pan: [-90, 90]}
  max_step: {shoulder_pan: 5}
  stale_s: 0.5
  stop_after_s: 2.0
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentact.errors import UserError, did_you_mean, missing_extra
from latentact.robots.connection import Robot
from latentact.robots.safety import SafetyConfig

KEYS = ("robot", "safety", "cameras")


@dataclass(frozen=True, kw_only=True)
class RobotSetup:
    """Content of a robot's YAML file."""

    robot: dict[str, Any]
    """LeRobot's settings; `type` is its registered name."""
    safety: SafetyConfig
    """Its limits."""
    cameras: dict[str, str]
    """Policy's image key by the name of the robot's camera; the default is observation.images.<name>."""

    @classmethod
    def read(cls, path: str | Path) -> RobotSetup:
        """Read a YAML file.

        Raises:
            UserError: the file is missing, is not YAML, or has unknown settings.
        """
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            first = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read: {first}. Give a robot's YAML file.") from error
        if not isinstance(values, dict) or not isinstance(values.get("robot"), dict):
            raise UserError(f"{path} has no robot. Add robot: {{type: NAME, ...}}.")
        if strange := sorted(set(map(str, values)) - set(KEYS)):
            raise UserError(f"{path} has an unknown setting {strange[0]!r}{did_you_mean(strange[0], KEYS)}")
        cameras = values.get("cameras") or {}
        if not isinstance(cameras, dict):
            raise UserError(
                f"{path}: cameras must map the robot's cameras to the policy's keys, got {cameras!r}. Write "
                "for example cameras: {front: observation.images.front}."
            )
        return cls(
            robot=values["robot"],
            safety=SafetyConfig.from_dict(values.get("safety") or {}),
            cameras={str(name): str(key) for name, key in cameras.items()},
        )


def make_robot(settings: Mapping[str, Any]) -> Robot:
    """Return a LeRobot robot, built in or from an installed plugin, not connected.

    Raises:
        UserError: the type is unknown, a setting is invalid, or a driver's package is missing.
    """
    _register_drivers()
    import draccus
    import lerobot.robots

    kind, known = str(settings.get("type")), lerobot.robots.RobotConfig.get_known_choices()
    if kind not in known:
        listed = f"Known: {', '.join(sorted(known))}."
        if kind == "pusht_sim":
            listed = "It comes with: pip install plugins/lerobot_robot_latentact_sim."
        hint = did_you_mean(kind, known).replace("See --help for all of them.", listed)
        raise UserError(f"unknown robot type {kind!r}{hint}")
    try:
        config = draccus.decode(lerobot.robots.RobotConfig, dict(settings))
        return lerobot.robots.make_robot_from_config(config)
    except (draccus.utils.DraccusException, ValueError, TypeError, ImportError, OSError) as error:
        message = " ".join(str(_root(error)).split())
        raise UserError(f"the robot {kind} cannot be created: {message}. Correct its settings.") from error


def make_camera(text: str) -> Any:
    """Return a LeRobot camera, built in or from an installed plugin, not connected.

    Args:
        text: `TYPE:key=value,...` with LeRobot's settings; for opencv also its index or path, `opencv:0`.

    Raises:
        UserError: the type is unknown, a setting is invalid, or a driver's package is missing.
    """
    import yaml

    _register_drivers()
    import draccus
    from lerobot.cameras import CameraConfig, make_cameras_from_configs

    kind, _, rest = text.partition(":")
    if kind not in (known := CameraConfig.get_known_choices()):
        listed = f"Known: {', '.join(sorted(known))}."
        hint = did_you_mean(kind, known).replace("See --help for all of them.", listed)
        raise UserError(f"unknown camera type {kind!r}{hint}")
    settings: dict[str, Any] = {"type": kind}
    for i, item in enumerate(rest.split(",") if rest else []):
        name, equals, value = item.partition("=")
        if not equals and kind == "opencv" and not i:
            name, value = "index_or_path", item
        elif not equals:
            raise UserError(
                f"the camera must be TYPE:key=value,..., got {item!r} in {text!r}. Write for example "
                "opencv:0,fps=30."
            )
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
        settings[name] = value
    try:
        return make_cameras_from_configs({"live": draccus.decode(CameraConfig, settings)})["live"]
    except (draccus.utils.DraccusException, ValueError, TypeError, ImportError, OSError) as error:
        message = " ".join(str(_root(error)).split())
        raise UserError(f"the camera {text} cannot be created: {message}. Correct its settings.") from error


def _register_drivers() -> None:
    """Import LeRobot's robots and cameras and those of plugins, which register their types.

    Raises:
        UserError: LeRobot is missing.
    """
    try:
        import lerobot.cameras
        import lerobot.robots
        from lerobot.utils.import_utils import register_third_party_plugins
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "lerobot", "lerobot") from error
    for package in (lerobot.robots, lerobot.cameras):
        for module in pkgutil.iter_modules(package.__path__):
            with suppress(ImportError):  # a driver's package is missing; its type stays unknown
                importlib.import_module(f"{package.__name__}.{module.name}")
    register_third_party_plugins()


def _root(error: BaseException) -> BaseException:
    """Return the original error, which draccus and LeRobot's factory wrap."""
    return _root(error.__cause__) if error.__cause__ else error


class RobotView:
    """Map a robot's observations to those of policies.

    Args:
        robot: the robot.
        cameras: policy's image key by the name of the robot's camera.

    Raises:
        UserError: the robot has no camera of a given name.
    """

    def __init__(self, robot: Robot, cameras: Mapping[str, str]) -> None:
        features = robot.observation_features
        self._shapes = {name: kind for name, kind in features.items() if isinstance(kind, tuple)}
        for name in cameras:
            if name not in self._shapes:
                raise UserError(f"the robot has no camera {name!r}{did_you_mean(name, self._shapes)}")
        self.cameras = {name: cameras.get(name, f"observation.images.{name}") for name in self._shapes}
        self.state_names = [name for name in features if name not in self._shapes]
        self.joints = list(robot.action_features)

    def __call__(self, observation: Mapping[str, Any], task: str = "") -> dict[str, Any]:
        """Return an unbatched observation with LeRobot's keys for policies."""
        images = {key: observation[name] for name, key in self.cameras.items()}
        state = np.array([observation[name] for name in self.state_names], np.float32)
        return {**images, "observation.state": state, "task": task}

    def blank(self) -> dict[str, Any]:
        """Return a robot's observation of zeros and black images."""
        images = {name: np.zeros(shape, np.uint8) for name, shape in self._shapes.items()}
        return {**images, **dict.fromkeys(self.state_names, 0.0)}

    def check_compatible(self, *, cameras: Sequence[str], state_size: int, action_size: int) -> None:
        """Raise a UserError if a policy needs images, states or actions that the robot does not have."""
        keys = list(self.cameras.values())
        missing = [key for key in cameras if key not in keys]
        if missing and not (len(cameras) == len(keys) == 1):
            raise UserError(
                f"the policy needs the image {missing[0] or 'of one camera'}, but the robot has "
                f"{', '.join(keys) or 'none'}. Map its camera to that key in the file's cameras."
            )
        if state_size not in (0, len(self.state_names)):
            raise UserError(
                f"the policy needs a state of {state_size} dimensions, but the robot observes "
                f"{len(self.state_names)} ({', '.join(self.state_names)}). Use the robot that it was trained "
                "for."
            )
        if action_size != len(self.joints):
            raise UserError(
                f"the policy returns {action_size} values, but the robot has {len(self.joints)} joints "
                f"({', '.join(self.joints)}). Use the robot that it was trained for."
            )
