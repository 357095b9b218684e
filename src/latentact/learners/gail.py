"""GAIL (Ho and Ermon, arXiv 1606.03476): a policy that a discriminator cannot tell from demonstrations.

PPO maximizes the discriminator's reward, in place of the environment's. Such a reward pays for staying alive
or for ending, whatever the demonstrations show, so the same training on worthless demonstrations is always
run beside it, and behavior cloning on the same demonstrations.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from latentact.config import Between, Count, OneOf
from latentact.data.cache import FrameStore
from latentact.data.splits import choose_labeled
from latentact.envs.spec import make_expert
from latentact.errors import UserError, missing_extra, require_between, require_one_of
from latentact.learners.contract import LEARNERS, LearnerTools, score
from latentact.policies.contract import Policy
from latentact.policies.network import STATE_LIMIT

REWARDS = ("gail", "airl", "neg")
CONTROLS = ("silly", "shuffled")


@LEARNERS.register("gail")
@dataclass(frozen=True, kw_only=True)
class GailConfig:
    """Settings of GAIL."""

    kind: str = "gail"
    """Registered name."""
    demos: Count = 10
    """Demonstrations."""
    steps: Count = 40_000
    """Environment steps of PPO."""
    reward: Annotated[str, OneOf(REWARDS)] = "gail"
    """gail: -log(1 - D), never negative, pays for staying alive; neg: log D, never positive, pays for ending;
    airl: their sum, the logit, with both signs."""
    horizon: Annotated[int, Between(0, 10**6)] = 0
    """Steps of every episode: after its end the last observation repeats, so that its length carries no
    information. 0: the environment's own ends."""
    control: Annotated[str, OneOf(CONTROLS)] = "silly"
    """Demonstrations of the control. silly: an expert that always takes the same action; shuffled: the
    expert's states with its actions in random order."""
    warm_start: bool = False
    """Whether PPO starts with the weights of behavior cloning."""
    envs: Annotated[int, Between(1, 256)] = 8
    """Environments in which PPO acts side by side."""
    rollout_steps: Annotated[int, Between(2, 10**6)] = 128
    """Steps per environment between updates."""
    batch_size: Annotated[int, Between(2, 10**6)] = 256
    """Steps per gradient step of PPO."""
    epochs: Annotated[int, Between(1, 1000)] = 10
    """Passes of PPO over the steps of a rollout."""
    lr: Annotated[float, Between(0, 1)] = 1e-3
    """Learning rate of PPO at the beginning; it falls to 0 linearly."""
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
        require_one_of("learner.reward", self.reward, REWARDS)
        require_one_of("learner.control", self.control, CONTROLS)
        for name, low, high in (
            *(("demos", 1, 10**6), ("steps", 1, 10**9), ("horizon", 0, 10**6), ("envs", 1, 256)),
            *(("rollout_steps", 2, 10**6), ("batch_size", 2, 10**6), ("epochs", 1, 1000), ("lr", 0, 1)),
            *(("gamma", 0, 1), ("gae_lambda", 0, 1), ("entropy", 0, 100), ("log_std", -20, 5)),
            *(("discriminator_lr", 0, 1), ("discriminator_batch", 1, 10**6), ("gradient_penalty", 0, 1000)),
            ("discriminator_updates", 1, 10**4),
        ):
            require_between(f"learner.{name}", getattr(self, name), low, high)

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
        if self.control == "silly":
            worthless = _silly(tools, self.demos, cloned)
        for method, shown in (("bc", demos), ("gail", demos), ("control", worthless)):
            policy, rollout = out / method / "policy", out / method / "rollout"
            if not (policy / "config.json").exists():
                self._imitate(tools, cloned, shown, out / method)
            found = tools.rollout(policy, rollout) | {"demonstrated": shown.mean_return}
            rows.append(found | {"method": method, "run": f"{method}/rollout"})
        return [row | {"labels": None, "demos": self.demos} for row in rows]

    def verdict(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return how GAIL does beside behavior cloning, the demonstrations and the control."""
        found = {m: score(some) for m in ("expert", "bc", "gail", "control") if (some := _of(rows, m))}
        own, cloning, control = found["gail"], found["bc"], found["control"]
        compared = "no better and no worse than"
        if own.above(cloning) or cloning.above(own):
            compared = "better than" if own.above(cloning) else "worse than"
        count = f"{self.demos} demonstration{'s' if self.demos > 1 else ''}"
        first = (
            f"GAIL is {compared} behavior cloning: {own.name} {own} against {cloning}, from the same {count}"
        )
        first += f"; the expert reaches {found['expert']}." if "expert" in found else "."
        worthless = "an expert that always does the same" if self.control == "silly" else "shuffled actions"
        shown = np.mean([row["demonstrated"] for row in _of(rows, "control")])
        if not own.above(control):
            second = (
                f"The control, GAIL on {worthless}, does as well: {control}. The form of the reward explains "
                "the result, not the demonstrations."
            )
        elif self.control == "silly" and own.name == "return" and control.low > shown:
            second = (
                f"The control, GAIL on {worthless}, reaches {control}, though that expert has {shown:.3g}: a "
                f"part of the result comes from the form of the reward ({self.reward}), not from the "
                "demonstrations."
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
            raise UserError(
                "gail needs policy=bc with policy.network.backbone=state and chunk_size=1, got "
                f"policy={tools.policy.kind} of another form. Set these."
            )
        env = tools.make_env()
        env.reset(seed=tools.first_seed)
        env.action_space.seed(tools.seed)
        info = env.step(env.action_space.sample())[-1]
        if "is_success" in info and not self.horizon:
            raise UserError(
                f"{tools.env.name} ends episodes by success, which the reward of GAIL pays for or against "
                "whatever the demonstrations show. Set learner.horizon, the steps of every episode."
            )
        if not tools.data:
            env.reset(seed=tools.first_seed)
            make_expert(tools.env.name, env, tools.first_seed)
        env.close()

    def _imitate(self, tools: LearnerTools, cloned: Policy, demos: _Demos, folder: Path) -> None:
        """Train a policy with PPO and save it; one that is interrupted starts again, with the same result."""
        from latentact.learners.adversarial.environment import NormalizedEnv, encode_steps
        from latentact.learners.adversarial.ppo import train_ppo

        space = tools.env.action_space
        demos = demos.until(self.horizon)
        expert = encode_steps(demos.states, demos.actions, demos.over, space)

        def make_env(number: int) -> NormalizedEnv:
            inner = tools.make_env()
            return NormalizedEnv(
                inner, cloned, space, self.horizon, tools.max_steps, (tools.first_seed, number)
            )

        policy = cloned.config.build(cloned.spec)
        policy.load_state_dict(cloned.state_dict())
        train_ppo(
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
    """Steps of demonstrations, one after the other."""

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
        """Return every episode with as many steps, the last state repeated after its end; 0: as they are."""
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
            "Give data of one of them."
        )
    assert store.state is not None
    states = _normal(policy, store.state)
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


def _normal(policy: Policy, states: np.ndarray) -> np.ndarray:
    """Return states as the policy's network gets them."""
    return policy.normal_state(torch.from_numpy(states)).clamp(-STATE_LIMIT, STATE_LIMIT).numpy()


def _silly(tools: LearnerTools, episodes: int, policy: Policy) -> _Demos:
    """Return episodes of an expert that always takes the first class, or the lower bound."""
    env, space = tools.make_env(), tools.env.action_space
    action: Any = (space.values or (0,))[0] if space.discrete else env.action_space.low
    states, lasts, lengths, returns = [], [], [], []
    for number in range(episodes):
        observation, _ = env.reset(seed=tools.first_seed + number)
        over, steps, total = False, 0, 0.0
        while not over:
            states.append(observation["agent_pos"])
            observation, reward, terminated, truncated, _ = env.step(action)
            steps, total = steps + 1, total + float(reward)
            over = terminated or truncated or steps == tools.max_steps
        lasts.append(observation["agent_pos"])
        lengths.append(steps)
        returns.append(total)
    env.close()
    encoded = np.zeros(len(states), np.int64)
    if not space.discrete:
        encoded = np.tile((action - policy.mean.numpy()) / policy.std.numpy(), (len(states), 1))
    return _Demos(
        states=_normal(policy, np.stack(states)),
        actions=encoded,
        over=np.zeros(len(states), bool),
        lasts=_normal(policy, np.stack(lasts)),
        lengths=np.array(lengths),
        mean_return=float(np.mean(returns)),
    )


def _expert_rows(
    tools: LearnerTools, store: FrameStore, episodes: np.ndarray, out: Path
) -> list[dict[str, Any]]:
    """Return the row of the environment's expert; without one, of demonstrations with rewards."""
    try:
        return [{**tools.expert(out / "expert"), "method": "expert", "run": "expert"}]
    except UserError:
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
