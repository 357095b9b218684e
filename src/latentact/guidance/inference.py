"""One video as a guide: its latent actions by a frozen LAM, and a policy that follows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from latentact.agents.agent import GuidedPolicy
from latentact.agents.load import load_guided_policy
from latentact.device import require_device
from latentact.errors import UserError
from latentact.guidance.align import SAME_RATE, follow, sample_tokens
from latentact.guidance.guide import Guide

BATCH = 32
"""Transitions encoded together; with their context they are all the frames that are in memory at once."""
SAME_GAP = 0.25
"""Relative difference up to which two transitions last equally long; as when data is labeled."""


def check_policy_matches_guide(policy: GuidedPolicy, guide: Guide) -> None:
    """Raise a UserError unless the policy was trained on latent actions like the guide's."""
    if policy.lam_weights and guide.spec.weights and policy.lam_weights != guide.spec.weights:
        raise UserError(
            f"the policy was trained with the LAM of weights {policy.lam_weights} and the guide comes from "
            f"{guide.spec.weights}; give --lam-model-path of the policy's own LAM."
        )
    mine, theirs = policy.latent, guide.spec
    if policy.gap_s and abs(policy.gap_s - theirs.frame_gap_s) > SAME_GAP * policy.gap_s:
        raise UserError(
            f"the policy follows latent actions of {policy.gap_s:g} s and the guide's span "
            f"{theirs.frame_gap_s:g} s; extract the guide at another --target-fps."
        )
    if (size := theirs.tokens * theirs.token_dim) != policy.token_size:
        raise UserError(
            f"the policy follows {policy.token_size} numbers per latent action and the guide has {size}; "
            "give --lam-model-path of the policy's own LAM."
        )
    if mine is not None:
        same_time = replace(theirs, frame_gap=mine.frame_gap, frame_gap_s=mine.frame_gap_s, fps=mine.fps)
        mine.check_compatible(same_time, "the policy", "the guide")


class LatentGuidedInference:
    """A policy that follows a guide, one robot action per call.

    Args:
        policy: folder of a policy that follows latent actions, or the loaded policy.
        guide: the guide, or where `Guide.save` wrote it.
        fps: control steps per second; 0: the policy's own rate, or else the guide's.
        time_base: hold or resample; see `follow`.
        device: cpu, cuda or mps.

    Raises:
        UserError: policy and guide do not belong together, or their rates cannot be reconciled.
    """

    def __init__(
        self,
        policy: str | Path | GuidedPolicy,
        guide: Guide | str | Path,
        *,
        fps: float = 0.0,
        time_base: str = "hold",
        device: str = "cpu",
    ) -> None:
        require_device(device)
        self.policy = load_guided_policy(policy, device) if isinstance(policy, (str, Path)) else policy
        self.guide = Guide.load(guide) if isinstance(guide, (str, Path)) else guide
        check_policy_matches_guide(self.policy, self.guide)
        self.fps = fps or self.policy.fps or self.guide.fps
        same_rate = abs(self.fps - self.policy.fps) <= SAME_RATE * self.policy.fps
        if self.policy.stride > 1 and self.policy.fps and not same_rate:
            raise UserError(
                f"the policy turns each latent action into {self.policy.stride} robot actions at "
                f"{self.policy.fps:g} per second and control runs at {self.fps:g}; give that rate as --fps."
            )
        self.position = follow(self.guide, self.fps, time_base)
        self._tokens = sample_tokens(self.guide, self.position, self.policy.tokens)
        rate = self.fps / self.policy.fps if self.policy.fps else 1.0
        self._ahead = np.round(np.asarray(self.policy.offsets) * rate).astype(int)
        self.reset()

    def __len__(self) -> int:
        """Control steps until the guide is over."""
        return len(self._tokens)

    def reset(self) -> None:
        """Begin again: the guide's first latent action, and a policy that has seen nothing."""
        self.step = 0
        self.policy.reset()

    def get_next_latent_action(self) -> Float32[Tensor, "o f"] | None:
        """Return the guide's tokens for the next step; None when the guide is over.

        A row per moment of the guide that the policy looks at; most look at the present one only.
        """
        if self.step >= len(self):
            return None
        rows = np.clip(self.step + self._ahead, 0, len(self) - 1)
        self.step += 1
        return torch.from_numpy(self._tokens[rows])

    def prepare_batch(self, observation: dict[str, Any], latent_action: Tensor) -> dict[str, Any]:
        """Return what the policy takes for an observation and the guide's tokens.

        Args:
            observation: `observation.images.<camera>` uint8 `[h, w, 3]`, `observation.state` float32 `[s]`
                where there is one, `task` where there is one.
            latent_action: what `get_next_latent_action` returned.
        """
        return self.policy.prepare(observation, latent_action.reshape(len(self._ahead), -1))

    def predict_action(self, observation: dict[str, Any]) -> np.ndarray | None:
        """Return the robot action, float32 `[a]` or an int64 class; None when the guide is over."""
        latent_action = self.get_next_latent_action()
        if latent_action is None:
            return None
        return self.policy.act(self.prepare_batch(observation, latent_action))
