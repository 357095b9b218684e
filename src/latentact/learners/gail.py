"""GAIL (Ho and Ermon, arXiv 1606.03476): a policy that a discriminator cannot tell from demonstrations.

PPO maximizes the discriminator's reward instead of the environment's. Such a reward favors staying alive or
for ending, whatever the demonstrations show. So there are always two baselines: the same training on
worthless demonstrations, which is the control, and behavior cloning on the same demonstrations.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from latentact.config import Between, Count, OneOf, check_bounds
from latentact.data.splits import choose_labeled
from latentact.data.store import FrameStore
from latentact.envs.episode import Episode, run_episodes
from latentact.envs.spec import make_expert
from latentact.errors import UserError, missing_extra, require_one_of
from latentact.learners.contract import LEARNERS, LearnerTools, compare_scores, score
from latentact.learners.ppo.discriminator import encode_steps, normalize_states
from latentact.policies.contract import Policy

REWARDS = ("gail", "airl", "neg")
CONTROLS = ("constant", "shuffled")


@LEARNERS.register("gail")
@dataclass(frozen=True, kw_only=True)
class GailConfig:
    """Settings of GAIL."""

    kind: str = "gail"
    """Registered name."""
    demos: Annotated[int, Between(1, 10**6)] = 10
    """Demonstrations."""
    steps: Count = 40_000
    """Environment steps of PPO."""
    reward: Annotated[str, OneOf(REWARDS)] = "gail"
    """gail: -log(1 - D), never negative, rewards staying alive; neg: log D, never positive, rewards ending;
    airl: their sum, the logit, with both signs."""
    horizon: Annotated[int, Between(0, 10**6)] = 0
    """Steps of every episode: after its end the last observation repeats, so that its length carries no
    information. 0: the environment's own ends."""
    control: Annotated[str, OneOf(CONTROLS)] = "constant"
    """Demonstrations of the control. constant: an expert that always takes the same action; shuffled: the
    expert's states with its actions in random order."""
    warm_start: bool = False
    """Whether PPO starts with the weights of behavior cloning."""
    envs: Annotated[int, Between(1, 256)] = 8
    """Parallel environments of PPO."""
    rollout_steps: Annotated[int, Between(2, 10**6)] = 128
    """Steps per environment between updates."""
    batch_size: Annotated[int, Between(2, 10**6)] = 256
    """Steps per gradient step of PPO."""
    epochs: Annotated[int, Between(1, 1000)] = 10
    """Passes of PPO over the steps of a rollout."""
    lr: Annotated[float, Between(0, 1)] = 1e-3
    """Initial learning rate of PPO, decayed linearly to 0."""
    gamma: Annotated[float, Between(0, 1)] = 0.99
    """Discount of rewards."""
    gae_lambda: Annotated[float, Between(0, 1)] = 0.9
    """Decay of generalized advantage estimation."""
    entropy: Annotated[float, Between(0, 100)] = 0.0
    """Weight of the entropy bonus."""
    log_std: Annotated[float, Between(-20, 5)] = 0.0
    """Logarithm of the first deviation of continuous actions, in deviations of the demonstrated ones."""
    discriminator_hidden: tuple[int, ...] = (64, 64)
    """Widths of the discriminator's layers."""
    discriminator_lr: Annotated[float, Between(0, 1)] = 3e-4
    """Its learning rate."""
    discriminator_batch: Annotated[int, Between(1, 10**6)] = 256
    """Steps of either side per update."""
    discriminator_updates: Annotated[int, Between(1, 10**4)] = 2
    """Updates per rollout."""
    gradient_penalty: Annotated[float, Between(0, 1000)] = 1.0
    """Weight of the penalty that keeps its gradients near 1."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.control == "silly":  # its name in earlier releases
            object.__setattr__(self, "control", "constant")
        require_one_of("learner.reward", self.reward, REWARDS)
        require_one_of("learner.control", self.control, CONTROLS)
        check_bounds(self, "learner.")

    def learn(self, tools: LearnerTools, out: Path) -> list[dict[str, Any]]:
        """Clone the demonstrations, run GAIL and its control, and return a row of each."""
        data = Path(tools.data) if tools.data else tools.collect(out / "demos", self.demos)
        store = tools.open(data)
        chosen = choose_labeled(np.arange(store.num_episodes), self.demos, 0)
        tools.train(data, out / "bc" / "policy", episodes=self.demos)
        cloned = Policy.from_pretrained(out / "bc" / "policy")
        demos = _demonstrations(store, chosen, cloned)
        rows = _expert_rows(tools, store, chosen, out)
        worthless = demos.shuffled(tools.seed)
        if self.control == "constant":
            worthless = _constant(tools, self.demos, cloned)
        for method, shown in (("bc", demos), ("gail", demos), ("control", worthless)):
            policy, rollout = out / method / "policy", out / method / "rollout"
            if not (policy / "config.json").exists():
                self._imitate(tools, cloned, shown, out / method)
            found = tools.rollout(policy, rollout) | {"demonstrated": shown.mean_return}
            rows.append(found | {"method": method, "run": f"{method}/rollout"})
        return [row | {"labels": None, "demos": self.demos} for row in rows]

    def verdict(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return a comparison of GAIL with behavior cloning, the expert and the control."""
        found = {m: score(some) for m in ("expert", "bc", "gail", "control") if (some := _of(rows, m))}
        own, cloning, control = found["gail"], found["bc"], found["control"]
        count = f"{self.demos} demonstration{'s' if self.demos > 1 else ''}"
        first = (
            f"GAIL is {compare_scores(own, cloning)} behavior cloning: {own.name} {own} against {cloning}, "
            f"from the same {count}"
        )
        first += f"; the expert reaches {found['expert']}." if "expert" in found else "."
        if self.control == "constant":
            worthless = "an expert that always takes the same action"
            shown = np.mean([row["demonstrated"] for row in _of(rows, "control")])
        else:
            worthless, shown = "shuffled actions", math.inf  # whose return is unknown
        if not own.above(control):
            second = (
                f"The control, GAIL on {worthless}, does as well: {control}. The form of the reward explains "
                "the result, not the demonstrations."
            )
        elif own.name == "return" and control.low > shown:
            second = (
                f"The control, GAIL on {worthless}, reaches {control}, although that expert's return is "
                f"{shown:.3g}: part of the result comes from the form of the reward ({self.reward}), not "
                "from the demonstrations."
            )
        else:
            second = f"The control, GAIL on {worthless}, reaches {control}."
        return f"{first} {second}"

    def check(self, tools: LearnerTools) -> None:
        """Raise a UserError if GAIL cannot learn here."""
        if importlib.util.find_spec("stable_baselines3") is None:
            raise missing_extra("stable_baselines3", "gail")
        network = tools.policy.network
        if tools.uses_frames or tools.policy.kind != "bc" or network.chunk_size != 1:
            inputs = "frames" if tools.uses_frames else "the state alone"
            raise UserError(
                "gail needs policy=bc with policy.network.backbone=state and chunk_size=1, got "
                f"policy={tools.policy.kind} on {inputs} with chunk_size={network.chunk_size}. Set all three."
            )
        env = tools.make_env()
        env.reset(seed=tools.first_seed)
        env.action_space.seed(tools.seed)
        info = env.step(env.action_space.sample())[-1]
        if "is_success" in info and not self.horizon:
            raise UserError(
                f"learner.horizon must be set for {tools.env.name}, whose episodes end on success, got 0: "
                "GAIL rewards or penalizes such an end whatever the demonstrations show. Set it to the "
                "number of steps of every episode."
            )
        if self.control == "constant" and not tools.env.action_space.discrete:
            low: Any = env.action_space.low  # type: ignore[attr-defined]
            if not np.isfinite(low).all():
                raise UserError(
                    f"learner.control must be shuffled for {tools.env.name}, whose actions have no lower "
                    "bound for a constant expert, got constant."
                )
        if not tools.data:
            env.reset(seed=tools.first_seed)
            make_expert(tools.env.name, env, tools.first_seed)
        env.close()

    def _imitate(self, tools: LearnerTools, cloned: Policy, demos: _Demos, folder: Path) -> None:
        """Train a policy with PPO and save it; one that is interrupted starts again, with the same result."""
        from latentact.learners.ppo.environment import PolicyEnv
        from latentact.learners.ppo.gail import train_gail

        demos = demos.until(self.horizon)
        expert = encode_steps(demos.states, demos.actions, demos.over, tools.env.action_space)

        def make_env(number: int) -> PolicyEnv:
            return PolicyEnv(
                tools.make_env(),
                cloned,
                max_steps=tools.max_steps,
                seed=(tools.first_seed, number),
                horizon=self.horizon,
            )

        policy = cloned.config.build(cloned.spec)
        policy.load_state_dict(cloned.state_dict())
        train_gail(
            policy,
            make_env,
            expert,
            self,
            seed=tools.seed,
            warm=self.warm_start,
            name=folder.name,
            metrics=folder / "metrics.csv",
        )
        policy.save_pretrained(folder / "policy")


@dataclass(frozen=True, kw_only=True)
class _Demos:
    """Steps of demonstrations, concatenated."""

    states: np.ndarray
    """Normalized, `[n, s]`."""
    actions: np.ndarray
    """Class indices `[n]`, or normalized numbers `[n, a]`."""
    over: np.ndarray
    """Whether the step was after the end of its episode, `[n]`."""
    lasts: np.ndarray
    """The state after each episode, `[e, s]`."""
    lengths: np.ndarray
    """Steps of each episode, `[e]`."""
    mean_return: float | None
    """Mean return of the episodes; None: unknown."""

    def shuffled(self, seed: int) -> _Demos:
        """Return the same states with the actions in another order."""
        order = np.random.default_rng(seed).permutation(len(self.actions))
        return replace(self, actions=self.actions[order], mean_return=None)

    def until(self, horizon: int) -> _Demos:
        """Return all episodes with `horizon` steps, the last state repeated after the end; 0: unchanged."""
        if not horizon:
            return self
        states, actions, over, first = [], [], [], 0
        for length, last in zip(self.lengths, self.lasts, strict=True):
            rows = slice(first, first + min(length, horizon))
            more = max(0, horizon - length)
            states += [self.states[rows], np.repeat(last[None], more, 0)]
            actions += [self.actions[rows], np.repeat(self.actions[rows][-1:], more, 0)]
            over += [self.over[rows], np.ones(more, bool)]
            first += length
        return replace(
            self,
            states=np.concatenate(states),
            actions=np.concatenate(actions),
            over=np.concatenate(over),
            lengths=np.full(len(self.lengths), horizon),
        )


def _demonstrations(store: FrameStore, episodes: np.ndarray, policy: Policy) -> _Demos:
    """Return the steps of some episodes of a dataset.

    Raises:
        UserError: they differ in their task texts.
    """
    if policy.spec.words:
        raise UserError(
            f"gail needs demonstrations of one task, got {len(store.task_texts)} task texts in {store.path}. "
            "Give a dataset with a single task."
        )
    assert store.state is not None
    states = normalize_states(policy, store.state)
    actions = np.ma.getdata(store.actions(episodes))
    if not policy.spec.action_space.discrete:  # type: ignore[union-attr]
        actions = (actions - policy.mean.numpy()) / policy.std.numpy()
    last = store.starts + store.lengths - 1
    taken = np.isin(store.episode, episodes)
    taken[last] = False
    return _Demos(
        states=states[taken],
        actions=actions[taken],
        over=np.zeros(taken.sum(), bool),
        lasts=states[last[episodes]],
        lengths=store.lengths[episodes] - 1,
        mean_return=None,
    )


class _ConstantActor:
    """Always takes the same action."""

    def __init__(self, action: Any) -> None:
        self._action = action

    def reset(self, num_envs: int) -> None:
        """Begin new episodes."""
        self._num_envs = num_envs

    def act(self, observation: dict[str, Any]) -> list[Any]:
        """Return the action, once per episode."""
        return [self._action] * self._num_envs


def _constant(tools: LearnerTools, episodes: int, policy: Policy) -> _Demos:
    """Return episodes of an expert that always takes the first class, or the lower bound."""
    env, space = tools.make_env(), tools.env.action_space
    action: Any = (space.values or (0,))[0] if space.discrete else env.action_space.low
    played: list[Episode] = []
    for number in range(episodes):
        played += run_episodes(
            _ConstantActor(action),
            [env],
            [tools.first_seed + number],
            camera=tools.env.camera,
            max_steps=tools.max_steps,
            record=("states",),
        )
        if error := played[-1].error:
            raise error
    env.close()
    states = np.stack([state for episode in played for state in episode.states[:-1]])
    encoded = np.zeros(len(states), np.int64)
    if not space.discrete:
        encoded = np.tile((action - policy.mean.numpy()) / policy.std.numpy(), (len(states), 1))
    return _Demos(
        states=normalize_states(policy, states),
        actions=encoded,
        over=np.zeros(len(states), bool),
        lasts=normalize_states(policy, np.stack([episode.states[-1] for episode in played])),
        lengths=np.array([episode.steps for episode in played]),
        mean_return=float(np.mean([episode.total_reward for episode in played])),
    )


def _expert_rows(
    tools: LearnerTools, store: FrameStore, episodes: np.ndarray, out: Path
) -> list[dict[str, Any]]:
    """Return the row of the environment's expert; without one, of demonstrations with rewards."""
    if expert := tools.expert(out / "expert"):
        return [expert | {"method": "expert", "run": "expert"}]
    rewards, successes = (store.column(name) for name in ("next.reward", "next.success"))
    if rewards is None:
        return []
    mine = [store.episode == episode for episode in episodes]
    won = None if successes is None else [bool(successes[rows].any()) for rows in mine]
    if won is not None and not any(won):  # as in data of an environment without a success signal
        won = None
    returns = [float(rewards[rows].sum()) for rows in mine]
    return [{"method": "expert", "run": "", "successes": won, "returns": returns, "episodes": len(episodes)}]


def _of(rows: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["method"] == method]
