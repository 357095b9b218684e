"""A public check that an environment keeps the contract of `make_env` and `env_spec`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.boundary import import_gymnasium
from latentact.envs.spec import EnvError, EnvSpec, env_spec, make_env

if TYPE_CHECKING:
    import gymnasium as gym

STEPS = 5
"""Number of random actions in each episode."""


def check_env(env: str | gym.Env, *, spec: EnvSpec | None = None, view: str = "agent", seed: int = 0) -> None:
    """Check that an environment keeps the contract of `make_env` and `env_spec`.

    It is reset three times and takes a few random actions. An environment given by name is closed at the end.

    Args:
        env: name of an environment, or what a suite's `make` returns.
        spec: result of `Suite.spec`; None: that of an environment given by name, else not checked.
        view: as for `make_env`, for an environment given by name.
        seed: reset seed of two of the episodes; the third uses the next one.

    Raises:
        EnvError: a rule is broken; the message names it.
        UserError: there is no such environment.
    """
    if isinstance(env, str):
        made = make_env(env, view=view)
        try:
            check_env(made, spec=spec or env_spec(env, view=view), seed=seed)
        finally:
            made.close()
        return
    _check_spaces(env)
    if spec is not None:
        _check_spec(env, spec)
    env.action_space.seed(seed)
    actions = [env.action_space.sample() for _ in range(STEPS)]
    first, again = (_run(env, seed, actions) for _ in range(2))
    _run(env, seed + 1, actions)
    _require(len(first) == len(again), "the same seed must give the same episode, got a different length")
    for t, (a, b) in enumerate(zip(first, again, strict=True)):
        for key, value in a.items():
            same = np.array_equal(value, b[key])
            _require(same, f"the same seed must give the same episode, got a different {key} at step {t}")


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise EnvError(f"{rule}. Fix the environment.")


def _check_spaces(env: gym.Env) -> None:
    spaces = import_gymnasium().spaces
    space: Any = env.observation_space
    _require(
        isinstance(space, spaces.Dict) and {"pixels"} <= set(space.spaces) <= {"pixels", "agent_pos"},
        f"observation_space must be a Dict of pixels and, with a state, agent_pos, got {space}",
    )
    pixels = space["pixels"]
    image = isinstance(pixels, spaces.Box) and pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
    _require(image, f"observation_space['pixels'] must be a uint8 Box [h, w, 3], got {pixels}")
    if (state := space.spaces.get("agent_pos")) is not None:
        vector = isinstance(state, spaces.Box) and state.dtype == np.float32 and len(state.shape) == 1
        _require(vector, f"observation_space['agent_pos'] must be a float32 Box [s], got {state}")
    action: Any = env.action_space
    known = isinstance(action, spaces.Discrete) or (isinstance(action, spaces.Box) and len(action.shape) == 1)
    _require(known, f"action_space must be a Discrete or a one-dimensional Box, got {action}")


def _check_spec(env: gym.Env, spec: EnvSpec) -> None:
    space: Any = env.observation_space
    action: Any = env.action_space
    _require(spec.fps >= 1, f"spec.fps must be at least 1, got {spec.fps}")
    _require(
        spec.camera.startswith("observation.image"),
        f"spec.camera must start with observation.image, got {spec.camera!r}",
    )
    if isinstance(action, import_gymnasium().spaces.Discrete):
        kind, size = "discrete", int(action.n)
    else:
        kind, size = "continuous", int(np.prod(action.shape))
    _require(
        (spec.action_space.kind, spec.action_space.size) == (kind, size),
        f"spec.action_space must be that of the environment, got {spec.action_space} for {action}",
    )
    _require(
        len(spec.action_names) == spec.action_space.size,
        f"spec.action_names must have {spec.action_space.size} names, got {len(spec.action_names)}",
    )
    state = space.spaces.get("agent_pos")
    dims = 0 if state is None else state.shape[0]
    _require(
        len(spec.state_names) == dims, f"spec.state_names must have {dims} names, got {len(spec.state_names)}"
    )


def _run(env: gym.Env, seed: int, actions: list[Any]) -> list[dict[str, Any]]:
    """Run an episode and check every value; return the observations, rewards and ends of its steps."""
    result = env.reset(seed=seed)
    _require(
        isinstance(result, tuple) and len(result) == 2,
        f"reset must return an observation and info, got {type(result).__name__}",
    )
    observation, info = result
    _check_observation(env, observation, "reset")
    task = info.get("task") if isinstance(info, dict) else None
    _require(isinstance(task, str), f"info of reset must hold the task as a string, got {task!r}")
    steps: list[dict[str, Any]] = [dict(observation)]
    copies = [observation["pixels"].copy()]
    for action in actions:
        result: Any = env.step(action)
        _require(
            isinstance(result, tuple) and len(result) == 5,
            "step must return observation, reward, terminated, truncated and info",
        )
        observation, reward, terminated, truncated, info = result
        _check_observation(env, observation, "step")
        _require(
            isinstance(reward, (int, float)) and bool(np.isfinite(reward)),
            f"the reward must be a finite float, got {reward!r}",
        )
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            _require(isinstance(flag, bool), f"{name} must be a bool, got {flag!r}")
        success = info.get("is_success", False)
        _require(isinstance(success, bool), f"info['is_success'] must be a bool, got {success!r}")
        steps.append({**observation, "reward": reward, "terminated": terminated, "truncated": truncated})
        copies.append(observation["pixels"].copy())
        if terminated or truncated:
            break
    unchanged = all(np.array_equal(step["pixels"], copy) for step, copy in zip(steps, copies, strict=True))
    _require(unchanged, "pixels must be a new array at each step, got one that a later step overwrites")
    return steps


def _check_observation(env: gym.Env, observation: Any, source: str) -> None:
    space: Any = env.observation_space
    keys = set(observation) if isinstance(observation, dict) else type(observation).__name__
    _require(
        keys == set(space.spaces), f"the observation of {source} must have {set(space.spaces)}, got {keys}"
    )
    for key, box in space.spaces.items():
        value = observation[key]
        fits = isinstance(value, np.ndarray) and (value.dtype, value.shape) == (box.dtype, box.shape)
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        _require(fits, f"{key} of {source} must be {box.dtype} {list(box.shape)}, got {got}")
        _require(bool(np.isfinite(value).all()), f"{key} of {source} must be finite")
