"""Specs of a policy: its targets, training data, inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from latentact.errors import UserError, require_between
from latentact.types import ActionSpace, LatentActionSpec


@dataclass(frozen=True, kw_only=True)
class Target:
    """Target of a policy per step: `num_tokens` choices among `size` classes, or `size` continuous values."""

    RENAMED: ClassVar = {"groups": "num_tokens"}

    kind: Literal["classes", "continuous"]
    """classes or continuous."""
    size: int
    """Classes per choice, or number of continuous values."""
    num_tokens: int = 1
    """Choices per step; 1 for continuous targets."""

    @property
    def outputs(self) -> int:
        """Number of network outputs per step."""
        return self.size * self.num_tokens


@dataclass(frozen=True, kw_only=True)
class GuideSpec:
    """The part of a demonstration's LAM tokens that a guided policy is conditioned on at each step."""

    offsets: tuple[int, ...]
    """Steps ahead whose tokens are given; 0 is the transition that starts now."""
    size: int
    """Values of one step's tokens, k x d."""
    tokens: Literal["continuous", "vectors"] = "continuous"
    """continuous: before the quantizer; vectors: after it."""
    dropout: float = 0.0
    """Fraction of training samples whose guide is hidden, so that the policy also acts without one."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Training targets of a policy."""

    column: Literal["action", "continuous", "vectors", "codes"]
    """`action`: robot actions, or those of an inverse dynamics model; else a form of latent actions."""
    target: Target
    """Target of the network."""
    guide: GuideSpec | None = None
    """LAM tokens that the policy is conditioned on; None: not conditioned."""

    @property
    def latent(self) -> bool:
        """Whether the targets are latent actions, so that the policy needs grounding to act."""
        return self.column != "action"


def robot_action_target(actions: ActionSpace | None, kind: str) -> Target:
    """Return the target of a policy that predicts robot actions.

    Raises:
        UserError: the data has no robot actions.
    """
    if actions is None:
        raise UserError(
            f"the data must have robot actions for policy={kind}, got none. Give data with actions, or "
            "labels=DIR with policy=latent."
        )
    return Target(kind="classes" if actions.discrete else "continuous", size=actions.size)


def latent_action_target(latent: LatentActionSpec | None, column: str, kind: str) -> Target:
    """Return the target of a policy that predicts latent actions.

    Args:
        latent: spec of the latent actions; None without labels.
        column: continuous, vectors or codes.
        kind: registered name of the policy, for messages.

    Raises:
        UserError: there are no labels, or `column` is codes and they have none.
    """
    if latent is None:
        raise UserError(
            f"labels is required with policy={kind}. Give labels=DIR, the output of latentact label."
        )
    if column != "codes":
        return Target(kind="continuous", size=latent.tokens * latent.token_dim)
    if latent.codebook_size is None:
        raise UserError(
            f"policy.target must be continuous or vectors for labels of {latent.model}, which have no codes, "
            "got codes. Use policy.target=vectors."
        )
    return Target(kind="classes", size=latent.codebook_size, num_tokens=latent.tokens)


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """Inputs and outputs of a policy; saved with it."""

    resolution: int
    """Height and width in pixels."""
    channels: int = 3
    """Channels of a frame."""
    state_size: int = 0
    """Dimensions of the robot state; 0 without one."""
    words: tuple[str, ...] = ()
    """Vocabulary of the task text."""
    target: Target
    """Target of the network."""
    action_space: ActionSpace | None = None
    """Robot actions that the policy outputs; None before grounding."""
    stride: int = 1
    """Environment steps per predicted target."""
    fps: float = 0.0
    """Environment steps per second."""
    camera: str = ""
    """Camera key of the training data."""
    guide: GuideSpec | None = None
    """LAM tokens of a demonstration that the policy is conditioned on; None: not conditioned."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_between("spec.resolution", self.resolution, 1, 1 << 14)
        require_between("spec.state_size", self.state_size, 0, 1 << 20)
        require_between("spec.stride", self.stride, 1, 1 << 14)
        require_between("spec.fps", self.fps, 0, 1e6)
