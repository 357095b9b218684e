"""Inference with a guide: a policy follows the latent actions of one demonstration video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from latentact.agents.agent import TASK, Agent, LatentInput
from latentact.agents.load import load_agent
from latentact.data.time_base import gaps_agree, rates_agree
from latentact.device import require_device
from latentact.errors import UserError
from latentact.guidance.align import align_to_rate, sample_tokens
from latentact.guidance.guide import Guide

BATCH = 32
"""Transitions encoded together; bounds the number of frames in memory."""
TOKENS = "observation.lam_tokens"


def check_policy_matches_guide(latent: LatentInput, guide: Guide) -> None:
    """Raise a UserError unless the policy was trained on latent actions like the guide's."""
    spec = guide.spec
    if latent.weights and spec.weights and latent.weights != spec.weights:
        raise UserError(
            f"the policy was trained with the LAM of weights {latent.weights}, but the guide comes from "
            f"{spec.weights}. Give --lam-model-path of the policy's own LAM."
        )
    if latent.gap_s and not gaps_agree(spec.frame_gap_s, latent.gap_s):
        raise UserError(
            f"the policy was trained on latent actions of {latent.gap_s:g} s, but those of the guide span "
            f"{spec.frame_gap_s:g} s. Extract the guide at another --target-fps."
        )
    if (size := spec.tokens * spec.token_dim) != latent.size:
        raise UserError(
            f"the policy needs {latent.size} values per latent action, but the guide has {size}. "
            "Give --lam-model-path of the policy's own LAM."
        )
    if (own := latent.spec) is not None:
        same_time = replace(spec, frame_gap=own.frame_gap, frame_gap_s=own.frame_gap_s, fps=own.fps)
        own.check_compatible(same_time, "the policy", "the guide")


@runtime_checkable
class GuidedActor(Protocol):
    """An agent that follows a guide in one episode; the guide may still be growing, as with a live camera."""

    agent: Agent
    """The agent."""
    fps: float
    """Control steps per second."""

    @property
    def guide(self) -> Guide | None:
        """The guide; of a growing one, the latent actions so far, and None if there are none."""
        ...

    @property
    def position(self) -> Sequence[int] | np.ndarray:
        """Index in the guide of each control step."""
        ...

    @property
    def control_steps(self) -> int:
        """Number of control steps of the guide; 0: unknown."""
        ...

    @property
    def ended(self) -> bool:
        """Whether all of the guide was followed."""
        ...

    @property
    def error(self) -> UserError | None:
        """Why the source of the guide was lost."""
        ...

    @property
    def startup_s(self) -> float:
        """Seconds of video before the first action."""
        ...

    @property
    def newest_frame(self) -> UInt8[np.ndarray, "h w 3"] | None:
        """The newest frame of a live demonstration."""
        ...

    def warm_up(self, observation: dict[str, Any]) -> None:
        """Predict one action for an unbatched observation, and forget it: the first call is slow.

        Raises:
            UserError: the policy cannot act on such an observation.
        """
        ...

    def reset(self, num_envs: int = 1) -> None:
        """Start an episode."""
        ...

    def act(self, observation: dict[str, Any]) -> list[np.ndarray | None]:
        """Return the action for a batch of size one, as an `Actor`; None ends the episode."""
        ...

    def predict_action(self, observation: dict[str, Any]) -> np.ndarray | None:
        """Return the robot action for an unbatched observation; None at the end of the guide."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return what this way of following adds to `metrics.json`."""
        ...


class LatentGuidedInference:
    """An agent that follows a guide in one episode, one robot action per step.

    Args:
        policy: folder of a policy that is conditioned on latent actions, or a loaded agent.
        guide: the guide, or the path that `Guide.save` wrote.
        fps: control steps per second; 0: the policy's own rate, or else the guide's.
        time_base: hold or resample; see `align_to_rate`.
        device: cpu, cuda or mps.
        extra_steps: control steps after the end of the guide, in which the policy acts without it.

    Raises:
        UserError: policy and guide do not match, their rates cannot be reconciled, or the policy has not
            learned to act without a guide.
    """

    def __init__(
        self,
        policy: str | Path | Agent,
        guide: Guide | str | Path,
        *,
        fps: float = 0.0,
        time_base: str = "hold",
        device: str = "cpu",
        extra_steps: int = 0,
    ) -> None:
        require_device(device)
        self.agent = load_agent(policy, device, guided=True) if isinstance(policy, (str, Path)) else policy
        self.guide = Guide.load(guide) if isinstance(guide, (str, Path)) else guide
        spec, latent = self.agent.spec, self.agent.spec.latent
        if latent is None:
            raise UserError(
                "the policy must be conditioned on latent actions, got one that is not. Give a guided or "
                "grounded policy."
            )
        check_policy_matches_guide(latent, self.guide)
        if extra_steps and not latent.optional:
            raise UserError(
                f"--extra-steps must be 0 for a policy that always needs a guide, got {extra_steps}. Train "
                "one with policy.dropout above 0."
            )
        self.extra_steps = extra_steps
        self.fps = fps or spec.fps or self.guide.fps
        same_rate = rates_agree(self.fps, spec.fps)
        if latent.stride > 1 and spec.fps and not same_rate:
            raise UserError(
                f"the policy decodes each latent action into {latent.stride} robot actions at {spec.fps:g} "
                f"per second, but control runs at {self.fps:g}. Give --fps {spec.fps:g}."
            )
        self.position = align_to_rate(self.guide, self.fps, time_base)
        self._tokens = sample_tokens(self.guide, self.position, latent.kind)
        rate = self.fps / spec.fps if spec.fps else 1.0
        self.ahead = np.round(np.asarray(latent.offsets) * rate).astype(int)
        """Control steps ahead whose latent actions are read, one per offset of the policy."""
        self.error = self.newest_frame = None
        self.startup_s = 0.0
        self.reset()

    def __len__(self) -> int:
        """Return the number of control steps of the guide."""
        return len(self._tokens)

    @property
    def control_steps(self) -> int:
        """Number of control steps of the guide and after it."""
        return len(self) + self.extra_steps

    @property
    def ended(self) -> bool:
        """Whether all of the guide was followed, and the extra steps were made."""
        return self.step >= self.control_steps

    def to_json(self) -> dict[str, Any]:
        """Return nothing, since the guide is known before the run."""
        return {}

    def warm_up(self, observation: dict[str, Any]) -> None:
        """Predict one action for an unbatched observation, and forget it: the first call is slow."""
        self.predict_action(observation)
        self.reset()

    def reset(self, num_envs: int = 1) -> None:
        """Start a new episode at the guide's first latent action."""
        self.step = 0
        self.agent.reset(num_envs)

    def get_next_latent_action(self) -> Float32[Tensor, "o f"] | None:
        """Return the guide's tokens for the next step; None after the end of the guide.

        There is one row per offset of the policy's `LatentInput`.
        """
        step, self.step = self.step, self.step + 1
        if step >= len(self):
            return None
        return torch.from_numpy(self._tokens[np.clip(step + self.ahead, 0, len(self) - 1)])

    def prepare_batch(self, observation: dict[str, Any], latent_action: Tensor | None) -> dict[str, Any]:
        """Return a batch of size one from an observation and the guide's tokens.

        Args:
            observation: `observation.images.<camera>` uint8 `[h, w, 3]`, `observation.state` float32 `[s]`
                and `task`, each if there is one.
            latent_action: result of `get_next_latent_action`.

        Returns:
            The observation in the format of agents, and with a guide `observation.lam_tokens` float32
            `[1, o, f]`.
        """
        batch: dict[str, Any] = {TASK: [str(observation.get(TASK, ""))]}
        batch |= {key: np.asarray(value)[None] for key, value in observation.items() if key != TASK}
        if latent_action is None:
            return batch
        return batch | {TOKENS: latent_action.reshape(1, len(self.ahead), -1).numpy(force=True)}

    def predict_action(self, observation: dict[str, Any]) -> np.ndarray | None:
        """Return the robot action for an unbatched observation; None at the end.

        Float32 `[a]`, or one of the integers of a discrete action space.
        """
        if self.ended:
            return None
        batch = self.prepare_batch(observation, self.get_next_latent_action())
        return np.asarray(self.agent.act(batch, batch.pop(TOKENS, None))[0])

    def act(self, observation: dict[str, Any]) -> list[np.ndarray | None]:
        """Return the action for a batch of size one, as an `Actor`; None at the end."""
        if self.ended:
            return [None]
        tokens = self.get_next_latent_action()
        return [np.asarray(self.agent.act(observation, None if tokens is None else tokens[None].numpy())[0])]
