"""Meta-World: 50 tasks of a simulated robot arm (Yu et al., 2019; package metaworld 3), each with an expert.

State, camera, rate, step limit and task texts are those of LeRobot's environment `metaworld`, so that one
policy acts in both; frames are drawn without shadows and smoothed edges, which is ten times as fast. A level
is a task (`drawer-open-v3`), several (`drawer-open-v3,door-open-v3`) or `all`; of several, the episode with
reset seed i plays the i-th, in turn. An episode ends at success.
"""

from __future__ import annotations

import atexit
import ctypes.util
import difflib
import functools
import importlib.util
import logging
import os
import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from latentact.envs.adapt import adapt
from latentact.envs.boundary import env_errors, import_gymnasium
from latentact.envs.spec import ENVS, EnvSpec, Expert
from latentact.errors import UserError, did_you_mean, missing_extra
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym
    from jaxtyping import Bool, UInt8

log = logging.getLogger(__name__)

RESOLUTION = 84
CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)
STATE = ("x", "y", "z", "gripper")
HAND = (np.array([-0.525, 0.348, -0.0525, -1.0]), np.array([0.525, 1.025, 0.7, 1.0]))
"""Smallest and largest state: the hand's position in meters and how far the gripper is open."""
POSE = ("x", "y", "z", "q0", "q1", "q2", "q3")
PRESENT = (*STATE, *(f"{thing}_{part}" for thing in ("object", "second_object") for part in POSE))
FULL = (*PRESENT, *(f"previous_{name}" for name in PRESENT), "goal_x", "goal_y", "goal_z")
"""Meta-World's observation: the state, two objects (0 where there is none), the same one step ago, goal."""
ACTIONS = ("dx", "dy", "dz", "grasp")
FLOOR = 1
"""Number of the floor in drawings of numbered objects, the first of every task; 0: no object."""
EXPLORE = 0.3
"""Standard deviation of exploratory noise, of actions between -1 and 1."""
TASKS = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of a peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "hand-insert-v3": "Insert the gripper into a hole",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-insert-side-v3": "Insert a peg sideways",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "reach-v3": "Reach a goal position",
    "push-back-v3": "Push the puck to a goal",
    "push-v3": "Push the puck to a goal",
    "pick-place-v3": "Pick and place a puck to a goal",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "soccer-v3": "Kick a soccer into the goal",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-open-v3": "Push and open a window",
    "window-close-v3": "Push and close a window",
}
"""Text of every task."""


@ENVS.register("metaworld")
class MetaWorld:
    """The tasks of Meta-World, by name."""

    def check(self, name: str) -> None:
        """Raise a UserError if there is no such task, or Meta-World is not installed."""
        for task in _tasks(name):
            if task not in TASKS:
                near = difflib.get_close_matches(task, TASKS, n=5) or ["all", "drawer-open-v3", "reach-v3"]
                raise UserError(f"unknown Meta-World task {task!r}{did_you_mean(task, near)}")
        if importlib.util.find_spec("metaworld") is None:
            raise missing_extra("metaworld", "metaworld")

    def spec(self, name: str, view: str) -> EnvSpec:
        """Return the specification, which all tasks share."""
        return EnvSpec(
            name=name,
            fps=80,
            camera="observation.image",
            action_space=ActionSpace(kind="continuous", size=len(ACTIONS)),
            action_names=ACTIONS,
            state_names=FULL if view == "full" else STATE,
        )

    def make(self, name: str, resolution: int, view: str) -> gym.Env:
        """Return the environment: the image of LeRobot's camera; the view "full" has all of the state."""
        with env_errors(name, "to be made"):
            world = world_of(name)
        size, full = resolution or RESOLUTION, view == "full"
        return adapt(
            world,
            name=name,
            pixels=lambda _: world.camera(size).frame(world.simulation),
            resolution=size,
            state=(lambda observation: observation) if full else _hand,
            state_range=(np.full(len(FULL), -np.inf), np.full(len(FULL), np.inf)) if full else HAND,
            task=lambda: TASKS[world.task],
            success=lambda reward, terminated, info: terminated,
            floor=lambda _: world.camera(size).background().astype(np.float32),
            heading=lambda action: np.asarray(action[:2], np.float64),
        )

    def expert(self, name: str, env: gym.Env, seed: int) -> Expert:
        """Return the task's scripted policy, which makes no random choices."""
        return _Scripted(env)


class _Scripted(Expert):
    """A scripted policy of Meta-World: a function of the observation."""

    def __init__(self, env: gym.Env) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self._world = cast("Any", env.unwrapped)
        self._policy = ENV_POLICY_MAP[self._world.task]()

    def act(self, explore: np.random.Generator | None = None) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it leaves the bounds, to which actions are clipped
            action = self._policy.get_action(self._world.observation.copy())  # some change what they get
        noise = 0.0 if explore is None else explore.normal(0, EXPLORE, len(ACTIONS))
        return np.clip(np.clip(action, -1, 1) + noise, -1, 1).astype(np.float32)


def _hand(observation: np.ndarray) -> np.ndarray:
    return np.clip(observation[: len(STATE)], *HAND)


def _tasks(name: str) -> list[str]:
    level = name.partition("/")[2]
    return [*TASKS] if level == "all" else [task.strip() for task in level.split(",")]


def world_of(name: str) -> Any:
    """Return the tasks of an environment name as a Gymnasium environment that draws no frames."""
    choose_gl()
    return _world_class()(_tasks(name))


@functools.cache
def _world_class() -> Any:
    gymnasium = import_gymnasium()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    class World(gymnasium.Env):
        """Tasks of Meta-World, one per episode; observations float64 `[39]` with the goal."""

        action_space = gymnasium.spaces.Box(-1, 1, (len(ACTIONS),), np.float32)
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,), np.float64)

        def __init__(self, tasks: list[str]) -> None:
            self.tasks, self.task = tasks, ""
            self.simulation: Any = None
            self.observation = np.zeros(39)
            self._camera: _Camera | None = None

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
            super().reset(seed=seed)
            seed = int(self.np_random.integers(2**31)) if seed is None else seed
            self._enter(self.tasks[seed % len(self.tasks)])
            self.simulation.seed(seed)
            self.observation, _ = self.simulation.reset()
            return self.observation, {}

        def step(self, action: np.ndarray):
            self.observation, reward, _, truncated, info = self.simulation.step(action)
            return self.observation, float(reward), bool(info["success"]), truncated, info

        def camera(self, size: int) -> _Camera:
            """Return what draws the present task."""
            if self._camera is None:
                key = (self.task, size)
                self._camera = CAMERAS.get(key) or CAMERAS.setdefault(key, _Camera(self.simulation, size))
            return self._camera

        def _enter(self, task: str) -> None:
            if task == self.task:
                return
            self.close()
            simulation: Any = ALL_V3_ENVIRONMENTS[task]()
            simulation.model.cam_pos[simulation.model.camera(CAMERA).id] = CAMERA_POSITION
            simulation._partially_observable = False  # the goal is in the observation, and its bounds
            simulation.__dict__.pop("sawyer_observation_space", None)
            simulation._freeze_rand_vec, simulation.seeded_rand_vec = False, True  # starts by seed
            simulation._set_task_called = True
            self.simulation, self.task = simulation, task

        def close(self) -> None:
            if self.simulation is not None:
                self.simulation.close()
            self.simulation, self.task, self._camera = None, "", None

    return World


class _Camera:
    """Draws one task at one size; environments of a process share it.

    Args:
        simulation: of the task.
        size: height and width in pixels.
    """

    def __init__(self, simulation: Any, size: int) -> None:
        self._mujoco = mujoco = _mujoco()
        model = simulation.model
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 1
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        _gl_context().make_current()
        while UNUSED:
            UNUSED.pop().free()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        weakref.finalize(self, UNUSED.append, self._context)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = False
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
        self._view.fixedcamid = model.camera(CAMERA).id
        self._options, self._none = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._rectangle = mujoco.MjrRect(0, 0, size, size)

    def frame(self, simulation: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Return the present frame."""
        everything = self._mujoco.mjtCatBit.mjCAT_ALL.value
        self._mujoco.mjv_updateScene(
            simulation.model, simulation.data, self._options, self._none, self._view, everything, self._scene
        )
        return self._drawn()

    def background(self) -> Bool[np.ndarray, "h w"]:
        """Return where the last frame shows the floor or nothing."""
        flags = (self._mujoco.mjtRndFlag.mjRND_SEGMENT, self._mujoco.mjtRndFlag.mjRND_IDCOLOR)
        for flag in flags:
            self._scene.flags[flag] = True
        red, green, blue = np.moveaxis(self._drawn(), -1, 0)
        for flag in flags:
            self._scene.flags[flag] = False
        return (red <= FLOOR) & (green == 0) & (blue == 0)

    def _drawn(self) -> np.ndarray:
        size = self._rectangle.width
        pixels = np.empty((size, size, 3), np.uint8)
        _gl_context().make_current()
        self._mujoco.mjr_render(self._rectangle, self._scene, self._context)
        self._mujoco.mjr_readPixels(pixels, None, self._rectangle, self._context)
        # The camera is mounted upside down, and OpenGL's rows begin at the bottom: only columns are flipped.
        return np.ascontiguousarray(pixels[:, ::-1])


CAMERAS: weakref.WeakValueDictionary[tuple[str, int], _Camera] = weakref.WeakValueDictionary()
"""Those in use, by task and size."""
UNUSED: list[Any] = []
"""What former cameras hold in OpenGL's memory; it can be freed only while our context is the current one."""


def choose_gl() -> None:
    """Choose how MuJoCo draws, if nobody has (MUJOCO_GL) and there is no display: EGL, or else OSMesa.

    Raises:
        UserError: there is neither.
    """
    logging.getLogger("OpenGL").setLevel(logging.WARNING)
    os.environ.setdefault("LP_NUM_THREADS", "1")  # of Mesa's software renderer; processes divide the work
    if os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY") or sys.platform != "linux":
        return
    if ctypes.util.find_library("EGL"):
        os.environ["MUJOCO_GL"] = "egl"
    elif ctypes.util.find_library("OSMesa"):
        os.environ["MUJOCO_GL"] = "osmesa"
        log.info("Meta-World is drawn with OSMesa, because EGL is not installed")
    else:
        raise UserError(NO_GL.format("without a display"))


NO_GL = (
    "Meta-World must draw its frames with OpenGL, got none that works {}. Install EGL (on Debian "
    "libegl1 and libgl1-mesa-dri), or set MUJOCO_GL to egl, osmesa or glfw."
)


def _mujoco() -> Any:
    """Return the module, whose names type checkers do not know."""
    return importlib.import_module("mujoco")


@functools.cache
def _gl_context() -> Any:
    """Return the OpenGL context of this process.

    MuJoCo itself chooses one when it is imported, which may have been before `choose_gl`.

    Raises:
        UserError: there is none.
    """
    backend = os.environ.get("MUJOCO_GL", "")
    try:
        module = importlib.import_module(f"mujoco.{backend}") if backend in ("egl", "osmesa") else _mujoco()
        context = module.GLContext(64, 64)
    except Exception as error:  # of whichever library it is
        raise UserError(NO_GL.format(f"({type(error).__name__}: {error})")) from error
    atexit.register(context.free)
    return context
