"""The page Drive: latent or robot actions step forward dynamics and, beside it, the environment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from latentact.agents.agent import to_env_actions
from latentact.agents.grounded import DecoderAgent
from latentact.agents.load import load_agent
from latentact.data.store import known_rows
from latentact.envs.episode import to_observation
from latentact.envs.spec import make_env
from latentact.errors import UserError
from latentact.studio.images import uri
from latentact.studio.meaning import Survey
from latentact.studio.workspace import Workspace, predict, require_predictions

type Decode = Callable[[Float32[np.ndarray, "k d"], dict[str, Any]], Any]
"""Latent action and observation -> robot action."""

BY = ("latent actions", "robot actions")
STRONG = 1.5
"""Robot action of a continuous dimension's button, in standard deviations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """One button."""

    name: str
    words: str
    vectors: Float32[np.ndarray, "k d"]
    """Latent action for forward dynamics."""
    group: int
    action: Any = None
    """Robot action without what the state explains; None: the latent action is decoded."""


def controls(found: Survey, by: str) -> list[Control]:
    """Return a button for each code or cluster, or for each robot action.

    Raises:
        UserError: robot actions are requested, and the data has none.
    """
    if by == BY[0]:
        return [
            Control(name=found.title(g), words=found.words(g), vectors=found.centers[g], group=g)
            for g in range(min(len(found.centers), 24))
        ]
    if found.actions is None:
        raise UserError(
            "driving by robot actions needs labeled transitions, got none. Drive by latent actions."
        )
    known, taken = np.flatnonzero(found.known), found.actions[found.known]
    pairs: list[tuple[str, Any, np.ndarray]] = []
    if taken.ndim == 1:
        present = np.unique(taken).tolist()
        pairs = [(found.action_name(action), action, known[taken == action]) for action in present]
    else:
        mean, spread = taken.mean(0), taken.std(0)
        for i in np.flatnonzero(spread > 0)[:12]:
            for sign in (1, -1):
                target = mean + sign * STRONG * spread * (np.arange(len(mean)) == i)
                strength = sign * (taken[:, i] - mean[i])
                strongest = known[np.argsort(-strength)[: max(1, len(taken) // 20)]]
                name = f"{'+' if sign > 0 else '-'}{found.action_name(int(i))}"
                pairs.append((name, target.astype(np.float32), strongest))
    made = []
    for name, action, rows in pairs:
        typical = found.vectors[rows].mean(0)
        group = int(found.nearest(typical[None])[0])
        vectors = typical if found.codes is None else found.centers[group]
        made.append(Control(name=name, words=found.title(group), vectors=vectors, group=group, action=action))
    return made


def decoder(work: Workspace, found: Survey) -> tuple[Decode | None, str]:
    """Return how latent actions become robot actions, and a sentence about it.

    A grounded policy decodes them; without one, a linear probe of the data's labels.
    """
    if work.policy:
        agent = load_agent(work.policy, work.lam.device, guided=True)
        if isinstance(agent, DecoderAgent):

            def by_policy(vectors: np.ndarray, observation: dict[str, Any]) -> Any:
                agent.reset(1)
                return agent.act(observation, vectors.reshape(1, 1, -1))[0]

            return by_policy, "Latent actions are decoded by the grounded policy."
    if found.actions is None or work.store is None or work.store.action_space is None:
        return None, "Without labels or a grounded policy, latent actions cannot be decoded for it."
    space, offset = work.store.action_space, state_offset(work, found)
    weights = probe_weights(found)

    def by_probe(vectors: np.ndarray, observation: dict[str, Any]) -> Any:
        scores = np.append(vectors.reshape(-1), 1.0) @ weights
        if space.discrete:
            return to_env_actions(space, np.asarray(scores.argmax()))
        return (scores + offset(observation)).astype(np.float32)

    return by_probe, "Latent actions are decoded by a linear probe of the data's labels."


def probe_weights(found: Survey) -> np.ndarray:
    """Return the linear map from latent actions and 1 to recorded actions, or to scores of classes."""
    assert found.actions is not None
    taken = found.actions[found.known]
    targets = np.eye(len(np.bincount(taken)))[taken] if taken.ndim == 1 else taken
    flat = found.vectors[found.known].reshape(len(targets), -1).astype(np.float64)
    inputs = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
    size = np.trace(inputs.T @ inputs) / inputs.shape[1]
    ridge = 1e-4 * size * np.eye(inputs.shape[1])
    return np.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets)


def state_offset(work: Workspace, found: Survey) -> Callable[[dict[str, Any]], np.ndarray]:
    """Return the part of a continuous action that the robot's state explains, as a function of it."""
    store = work.store
    assert store is not None
    if store.state is None or store.action_space is None or store.action_space.discrete:
        return lambda observation: np.zeros(1, np.float32)
    actions = store.actions(range(store.num_episodes))[found.rows]
    known = known_rows(actions)
    inputs = np.concatenate([store.state[found.rows][known], np.ones((known.sum(), 1))], axis=1)
    weights, *_ = np.linalg.lstsq(inputs, np.ma.getdata(actions)[known].astype(np.float64), rcond=None)

    def offset(observation: dict[str, Any]) -> np.ndarray:
        return np.append(observation["observation.state"][0], 1.0) @ weights

    return offset


class Driver:
    """Forward dynamics and the environment of one user, a step per button.

    Args:
        work: the workspace.
        found: survey of the data, or of one demonstration.
        by: one of `BY`.
        first: first frame, where there is no environment.
        seed: reset seed of the environment.

    Raises:
        UserError: the LAM predicts no frames, or the environment fails.
    """

    def __init__(
        self, work: Workspace, found: Survey, by: str, first: UInt8[np.ndarray, "h w 3"] | None, seed: int
    ) -> None:
        require_predictions(work.model)
        if not 0 <= seed < 2**31:
            raise UserError(f"the seed must be between 0 and {2**31 - 1}, got {seed}.")
        self.work, self.controls = work, controls(found, by)
        self._lock = threading.Lock()
        self.note, self._decode, self._env = "", None, None
        self.steps, self._last, self._over = 0, "", False
        if work.env:
            self._spec = work.env_spec()
            store = work.store
            own = store.action_space if store else None
            if own is not None and (own.kind, own.size) != (
                self._spec.action_space.kind,
                self._spec.action_space.size,
            ):
                raise UserError(
                    f"the environment {work.env} must have the data's actions, {own}, got "
                    f"{self._spec.action_space}. Choose another --env, or none."
                )
            self._offset = state_offset(work, found) if own is not None else None
            self._space = own
            self._decode, self.note = decoder(work, found)
            self._env = make_env(work.env, view=work.view)
            self._pixels, info = self._env.reset(seed=seed)
            self._task = info["task"]
            first = self._pixels["pixels"]
            if self._decode is None and by == BY[0]:
                self.close()
        if first is None:
            raise UserError("driving needs a first frame, got none. Open a demonstration on the page Look.")
        now = work.lam.resized(np.asarray(first))
        self._past = [now] * (work.model.context + 1)
        self._real: np.ndarray | None = now if self._env else None

    def press(self, index: int) -> None:
        """Take the step of a button.

        Raises:
            UserError: there is no such button, or the environment fails.
        """
        if not 0 <= index < len(self.controls):
            raise UserError(f"the button must be one of {len(self.controls)}, got {index}.")
        control = self.controls[index]
        with self._lock:  # keys that follow each other closely
            self._step(control)

    def _step(self, control: Control) -> None:
        window = torch.from_numpy(np.stack(self._past)).permute(0, 3, 1, 2)[None]
        now = self.work.lam.resized(predict(self.work.model, window, control.vectors[None])[0])
        self._past = [*self._past[1:], now]
        self.steps, self._last = self.steps + 1, control.name
        if self._env is not None and not self._over:
            self._act(control)

    def _act(self, control: Control) -> None:
        assert self._env is not None
        action: Any = None
        for _ in range(max(1, round(self.work.model.spec.frame_gap_s * self._spec.fps))):
            action = self._robot_action(control)
            self._pixels, _, terminated, truncated, _ = self._env.step(action)
            self._over = terminated or truncated
            if self._over:
                break
        self._real = self.work.lam.resized(self._pixels["pixels"])
        self._last += f", robot action {self._named(action)}"

    def _robot_action(self, control: Control) -> Any:
        observation = to_observation([self._pixels], [self._task], self._spec.camera)
        if control.action is None:
            assert self._decode is not None
            return self._decode(control.vectors, observation)
        if isinstance(control.action, int):
            assert self._space is not None
            return to_env_actions(self._space, np.asarray(control.action))
        assert self._offset is not None
        return (control.action + self._offset(observation)).astype(np.float32)

    def _named(self, action: Any) -> str:
        space, names = self._spec.action_space, self._spec.action_names
        if not space.discrete:
            return ", ".join(f"{each:.2f}" for each in np.asarray(action).ravel()[:6])
        value = int(np.asarray(action))
        index = space.values.index(value) if space.values else value
        return names[index] if index < len(names) else str(value)

    def follow_reality(self) -> None:
        """Replace what was imagined by the environment's frame."""
        if self._real is not None:
            self._past = [self._real] * len(self._past)

    def page(self) -> dict[str, Any]:
        """Return the data of the page."""
        facts = f"{self.steps} steps"
        if self._last:
            facts += f" · last: {self._last}"
        if self._real is not None:
            error = np.square((self._past[-1] - self._real.astype(np.float32)) / 255).mean()
            facts += f" · imagined and real differ by {error:.4f} (mean squared error, 0 to 1)"
        if self._over:
            facts += " · the environment has ended its episode; reset to go on"
        return {
            "imagined": uri(self._past[-1]),
            "real": None if self._real is None else uri(self._real),
            "controls": [{"name": c.name, "words": c.words, "group": c.group} for c in self.controls],
            "facts": facts,
            "steps": self.steps,
        }

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            self._env.close()
            self._env = None
