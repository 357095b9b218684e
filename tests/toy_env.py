"""A toy Gymnasium environment with replaceable parts, and a policy with a constant action."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from latentact.policies.bc import BcConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, Target
from latentact.types import ActionSpace

IMAGE = gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)
VECTOR = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
FRAME = np.full((32, 32, 3), 200, np.uint8)


class Toy(gymnasium.Env):
    """Returns `FRAME` and reward 1, without success, unless a part is replaced."""

    metadata = {"render_fps": 20}  # noqa: RUF012 (as Gymnasium has it)
    taken: list[Any] = []  # noqa: RUF012
    """Actions of all toy environments, in order."""

    def __init__(self, render_mode: str | None, action: Any, observation: Any, parts: dict[str, Any]) -> None:
        self.render_mode, self.action_space, self.observation_space = render_mode, action, observation
        self.metadata = {**self.metadata, "render_modes": parts.get("modes", ["rgb_array"])}
        self.parts, self.steps = parts, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        return self.parts["reset"](self) if "reset" in self.parts else (self.observe(), {})

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.taken.append(action)
        default = (self.observe(), 1.0, False, False, {})
        return self.parts["step"](self, default) if "step" in self.parts else default

    def render(self) -> Any:
        return self.parts["render"](self)

    def close(self) -> None:
        if "close" in self.parts:
            self.parts["close"](self)

    def observe(self) -> Any:
        if "observe" in self.parts:
            return self.parts["observe"](self)
        return FRAME.copy() if self.observation_space is IMAGE else np.zeros(2, np.float32)


def toy(
    name: str,
    *,
    action: Any = None,
    observation: Any = IMAGE,
    limit: int | None = 5,
    **parts: Any,
) -> str:
    """Register a toy environment and return its name.

    Args:
        name: its id.
        action: its action space; None: Discrete(2).
        observation: its observation space.
        limit: its `max_episode_steps`.
        parts: functions of the environment: `reset`, `render`, `observe`, `close`, and `step`, which also
            takes the five values that it would return; and its render `modes`.
    """
    action = gymnasium.spaces.Discrete(2) if action is None else action
    gymnasium.registry.pop(name, None)
    gymnasium.register(
        name,
        entry_point=lambda render_mode=None: Toy(render_mode, action, observation, parts),
        max_episode_steps=limit,
    )
    Toy.taken.clear()
    return name


def constant_policy(
    folder: Path,
    action: Any,
    space: ActionSpace | None = None,
    camera: str = "observation.images.camera",
    **spec: Any,
) -> Path:
    """Write a policy that always takes one action: a class, or numbers `[a]`."""
    discrete = isinstance(action, int)
    size = 2 if discrete else len(action)
    space = space or ActionSpace(kind="discrete" if discrete else "continuous", size=size)
    target = Target(kind="classes" if discrete else "continuous", size=space.size)
    network = NetworkConfig(backbone="patch", patch=8, channels=(8,), use_state="state_size" in spec)
    about = PolicySpec(resolution=32, target=target, action_space=space, fps=10.0, camera=camera, **spec)
    policy = BcConfig(network=network).build(about)
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.zero_()
        if discrete:
            policy.head.bias[action] = 1.0
        else:
            policy.mean.copy_(torch.tensor(action))
    policy.save_pretrained(folder)
    return folder
