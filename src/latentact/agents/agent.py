"""The one protocol through which every policy acts, in environments and on robots.

Observations are dicts with LeRobot's keys, batch first: `observation.images.<camera>` uint8 `[b, h, w, 3]`,
`observation.state` float32 `[b, s]` and `task`, a list of b strings. Row j is the same episode from call to
call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from latentact.envs.checks import check_compatible
from latentact.envs.spec import EnvSpec
from latentact.errors import UserError
from latentact.types import ActionSpace, LatentActionSpec

IMAGES = "observation.image"
"""Prefix of the image keys: `observation.image` and `observation.images.<camera>`."""
STATE = "observation.state"
TASK = "task"


@dataclass(frozen=True, kw_only=True)
class LatentInput:
    """The latent actions that an agent is conditioned on."""

    size: int
    """Values per timestep, tokens times dimensions."""
    kind: str
    """continuous, vectors or codes."""
    offsets: tuple[int, ...] = (0,)
    """Timesteps ahead whose latent actions are read; (0,): only the current one."""
    stride: int = 1
    """Robot actions per latent action."""
    gap_s: float = 0.0
    """Seconds that a latent action spans; 0: unknown."""
    spec: LatentActionSpec | None = None
    """Spec of the latent actions; None if the checkpoint does not record it."""
    weights: str = ""
    """Hash of the LAM's weights, for checkpoints without `spec`; empty: unknown."""
    optional: bool = False
    """Whether the policy was also trained without latent actions."""


@dataclass(frozen=True, kw_only=True)
class AgentSpec:
    """Inputs that an agent needs from an environment or robot, and its outputs."""

    action_space: ActionSpace
    """Robot action."""
    cameras: tuple[str, ...] = ()
    """Keys of the required images; ("",): one image under any key."""
    channels: int = 3
    """Channels of these images."""
    state_size: int = 0
    """Dimensions of the required robot state; 0: none."""
    fps: float = 0.0
    """Robot actions per second in its training data; 0: unknown."""
    latent: LatentInput | None = None
    """Latent actions it is conditioned on; None if it is conditioned on observations only."""

    def check_env(self, env: EnvSpec, source: str) -> None:
        """Raise a UserError if the agent, loaded from `source`, cannot act in an environment."""
        check_compatible(
            env,
            source,
            actions=self.action_space,
            cameras=self.cameras,
            channels=self.channels,
            state_size=self.state_size,
        )


@runtime_checkable
class Agent(Protocol):
    """A policy that acts in b episodes in parallel."""

    spec: AgentSpec
    """Inputs and outputs."""

    def reset(self, num_envs: int) -> None:
        """Clear all per-episode state; `num_envs` new episodes start."""
        ...

    def act(
        self, observation: dict[str, Any], latent: Float32[np.ndarray, "b o f"] | None = None
    ) -> Shaped[np.ndarray, "b *a"]:
        """Return one robot action per episode: float32 `[b, a]`, or int64 `[b]` by `ActionSpace.values`.

        Args:
            observation: see the module docstring.
            latent: latent actions at the offsets of `spec.latent`; None: act on the observation alone.

        Raises:
            UserError: the observation lacks an image or the state, or an action is not finite.
        """
        ...


def select_image(observation: dict[str, Any], camera: str) -> UInt8[np.ndarray, "... h w c"]:
    """Return the image of a camera, or the only image under any key.

    Raises:
        UserError: there is no image, or there are several and none has this key.
    """
    images = {key: value for key, value in observation.items() if key.startswith(IMAGES)}
    if camera in images:
        return images[camera]
    if len(images) == 1:
        return next(iter(images.values()))
    raise UserError(
        f"the observation must have the image {camera or 'of one camera'}, got "
        f"{', '.join(images) or 'none'}. Map one of the robot's cameras to that key."
    )


def select_state(observation: dict[str, Any], size: int) -> Float32[np.ndarray, "b s"]:
    """Return the robot state.

    Raises:
        UserError: the state is missing or has a different size.
    """
    state = observation.get(STATE)
    if state is None or state.shape[-1] != size:
        got = "none" if state is None else str(state.shape[-1])
        raise UserError(
            f"the robot state must have {size} dimensions, got {got}. Use the robot or environment that the "
            "policy was trained for."
        )
    return np.asarray(state, np.float32)


def to_env_actions(space: ActionSpace, actions: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Map class indices to the values of the action space; continuous actions are returned unchanged."""
    return np.array(space.values)[actions] if space.values else actions
