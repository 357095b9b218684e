"""latentact policies as agents, with the frame history and action chunk of each episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped, UInt8

from latentact.agents.agent import (
    IMAGES,
    STATE,
    TASK,
    AgentSpec,
    LatentInput,
    select_image,
    select_state,
    to_env_actions,
)
from latentact.data.samples import PolicyBatch, count_words
from latentact.errors import UserError
from latentact.policies.contract import Policy
from latentact.policies.selection import Choose, greedy


class PolicyObservations:
    """Prepare observations for a policy: recent frames, robot state and the words of the task.

    Args:
        policy: the policy.
    """

    def __init__(self, policy: Policy) -> None:
        self._spec = policy.spec
        self._length = (policy.config.network.n_obs_steps - 1) * policy.spec.stride + 1
        self._state_size = policy.spec.state_size if policy.uses_state else 0
        self.reset()

    def reset(self) -> None:
        """Clear the frame history; new episodes start."""
        self._history: list[np.ndarray] = []

    def append(self, observation: dict[str, Any]) -> None:
        """Add the frames of the next timestep; the first ones are repeated to fill the history."""
        frames = select_image(observation, self._spec.camera)
        self._history = [*(self._history or [frames] * self._length), frames][-self._length :]

    @property
    def frames(self) -> UInt8[np.ndarray, "b o h w c"]:
        """The recent frames, latest last."""
        return np.stack(self._history[:: self._spec.stride], axis=1)

    def state(self, observation: dict[str, Any]) -> Float32[np.ndarray, "b s"] | None:
        """Return the robot state of an observation; None if the policy does not use it.

        Raises:
            UserError: the state is missing or has a different size.
        """
        return select_state(observation, self._state_size) if self._state_size else None

    def words(self, tasks: Sequence[str]) -> Float32[np.ndarray, "b v"]:
        """Return how often each word of the policy's vocabulary occurs in task texts."""
        counts = [count_words(task, self._spec.words) for task in tasks]
        return np.asarray(counts, np.float32).reshape(len(tasks), len(self._spec.words))

    def batch(self, observation: dict[str, Any], latent: np.ndarray | None = None) -> PolicyBatch:
        """Return the policy's inputs at the timestep that was appended last, without targets.

        Args:
            observation: of this timestep; see `agents.agent`.
            latent: latent actions of a guide, ``[b, offsets, k * d]``; None: without a guide.

        Raises:
            UserError: the state is missing or has a different size.
        """
        frames, state = self.frames, self.state(observation)
        b = len(frames)
        tasks = observation[TASK] if self._spec.words else [""] * b
        return PolicyBatch(
            frames=torch.from_numpy(frames).permute(0, 1, 4, 2, 3),
            state=None if state is None else torch.from_numpy(state),
            words=torch.from_numpy(self.words(tasks)),
            target=torch.zeros(b, 0, 1),
            mask=torch.zeros(b, 0, dtype=torch.bool),
            guide=None if latent is None else torch.from_numpy(latent),
        )


class PolicyAgent:
    """Run a policy that outputs robot actions; a guided policy also takes latent actions.

    Args:
        policy: the policy.
        device: where to run it.
        autocast: whether to run it in bf16.
        choose: selects the class of a discrete action.

    Raises:
        UserError: the policy predicts latent actions and is not grounded.
    """

    def __init__(
        self, policy: Policy, device: str = "cpu", autocast: bool = False, choose: Choose = greedy
    ) -> None:
        self.policy = policy.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.autocast, self._choose = device, autocast, choose
        self.spec = agent_spec(policy)
        self._observations = PolicyObservations(policy)
        self.reset(0)

    def reset(self, num_envs: int) -> None:
        """Clear the frame history and the action chunk of every episode."""
        self._observations.reset()
        self._chunk: Any = None
        self._used = 0

    def act(
        self, observation: dict[str, Any], latent: Float32[np.ndarray, "b o f"] | None = None
    ) -> Shaped[np.ndarray, "b *a"]:
        """Return one robot action per episode; see `Agent.act`. NaN in a row of `latent` hides that row."""
        self._observations.append(observation)
        steps = self.policy.config.network.n_action_steps * self.policy.spec.stride
        if self._chunk is None or self._used == steps:
            batch = self._observations.batch(observation, latent).to(self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                actions = self.policy.actions(batch, self._choose)
            self._chunk, self._used = to_env_actions(self.spec.action_space, actions), 0
        self._used += 1
        return self._chunk[:, self._used - 1]


def agent_spec(policy: Policy) -> AgentSpec:
    """Return the spec of a policy that acts on observations.

    Raises:
        UserError: the policy predicts latent actions and is not grounded.
    """
    spec, latent = policy.spec, None
    if spec.action_space is None:
        raise UserError(
            "the policy must output robot actions, got latent actions. Ground it first: latentact ground "
            "--help."
        )
    if spec.guide is not None:
        latent = LatentInput(
            size=spec.guide.size,
            kind=spec.guide.tokens,
            offsets=spec.guide.offsets,
            gap_s=policy.latent.frame_gap_s if policy.latent else 0.0,
            spec=policy.latent,
            optional=spec.guide.dropout > 0,
        )
    return AgentSpec(
        action_space=spec.action_space,
        cameras=(spec.camera,) if policy.uses_frames else (),
        channels=spec.channels,
        state_size=spec.state_size if policy.uses_state else 0,
        fps=spec.fps,
        latent=latent,
    )


class PolicyActor(PolicyAgent):
    """Deprecated name of `PolicyAgent`, which also takes images, states and tasks as separate arguments."""

    def act(  # type: ignore[override]
        self,
        pixels: np.ndarray | dict[str, Any],
        state: np.ndarray | None = None,
        tasks: list[str] | None = None,
        guide: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return one robot action per episode, from an observation or its separate parts."""
        if isinstance(pixels, dict):
            return super().act(pixels, state if guide is None else guide)
        observation: dict[str, Any] = {IMAGES: pixels, TASK: tasks or [""] * len(pixels)}
        return super().act(observation if state is None else {**observation, STATE: state}, guide)
