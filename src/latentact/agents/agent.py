"""Policies that follow a guide, behind one small interface: what they look at, and one action per call.

Three kinds are known by their folder: LeRobot policies of the plugin (`lam_diffusion`, `lam_act`), our own
guided policies, and our own grounded latent policies, whose decoder alone turns a latent action into robot
actions. Observations are dicts with LeRobot's keys: `observation.images.<camera>` uint8 `[h, w, 3]`,
`observation.state` float32 `[s]`, `task`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from latentact.errors import UserError
from latentact.types import ActionSpace, LatentActionSpec

IMAGES = "observation.image"
STATE = "observation.state"


@runtime_checkable
class GuidedPolicy(Protocol):
    """A policy that takes the guide's tokens of the present step, or of several."""

    latent: LatentActionSpec | None
    """What the latent actions meant that it was trained with; None where it does not say."""
    lam_weights: str
    """Hash of the LAM's weights; empty where it does not say."""
    gap_s: float
    """Seconds that its latent actions spanned; 0 where it does not say."""
    token_size: int
    """Numbers of one step's tokens, k x d."""
    tokens: str
    """continuous, vectors or codes."""
    offsets: tuple[int, ...]
    """Steps ahead whose tokens it sees; (0,): only the present ones."""
    stride: int
    """Robot actions per latent action."""
    fps: float
    """Robot actions per second in its training data; 0: unknown."""
    cameras: tuple[str, ...]
    """Keys of the pictures that it looks at; ("",): any one."""
    state_size: int
    """Numbers of the robot state that it looks at; 0: none."""
    actions: ActionSpace
    """What its actions are."""
    without_guide: bool
    """Whether it has learned to act without a guide, too."""

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        ...

    def prepare(
        self, observation: dict[str, Any], latent_action: Float32[Tensor, "o f"] | None
    ) -> dict[str, Any]:
        """Return what `act` takes; None: without a guide, for a policy that has learned that."""
        ...

    def act(self, batch: dict[str, Any]) -> np.ndarray:
        """Return one robot action: float32 `[a]`, or an int64 class by its `ActionSpace.values`."""
        ...


def picture(observation: dict[str, Any], camera: str) -> np.ndarray:
    """Return the picture of a camera; where there is only one, that one."""
    pictures = {key: value for key, value in observation.items() if key.startswith(IMAGES)}
    if camera in pictures:
        return pictures[camera]
    if len(pictures) == 1:
        return next(iter(pictures.values()))
    raise UserError(
        f"the policy looks at {camera or 'one picture'} and there is {', '.join(pictures) or 'none'}; map "
        "one of the robot's cameras to that key."
    )


def _state(observation: dict[str, Any], size: int) -> Float32[np.ndarray, " s"]:
    state = observation.get(STATE)
    if state is None or state.shape != (size,):
        got = "none" if state is None else f"{len(state)} numbers"
        raise UserError(
            f"the policy wants a robot state of {size} numbers and got {got}; give the robot or environment "
            "that it was trained for."
        )
    return np.asarray(state, np.float32)


def action_values(space: ActionSpace | None, actions: np.ndarray) -> np.ndarray:
    """Return the numbers that stand for classes in data and environments; continuous actions as they are."""
    return np.array(space.values)[actions] if space and space.values else actions
