"""Learn latent action -> robot action from few labeled episodes: `latentact ground policy=DIR labels=DIR`.

The folder holds the policy with the decoder behind it; with `finetune_steps` the folder `finetuned` in it
holds the same policy trained on, end to end, on the labeled episodes.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from latentact.config import LARGEST
from latentact.data.cache import FrameStore, known_rows
from latentact.data.latents import Labels, read_labels
from latentact.data.samples import PolicyBatch, PolicySamples
from latentact.data.splits import choose_labeled, split_episodes
from latentact.errors import UserError, require_between
from latentact.io.atomic import write_json
from latentact.lams.contract import action_loss
from latentact.policies.contract import Policy
from latentact.policies.decoder import DecoderConfig
from latentact.training.fit import fit
from latentact.training.run_folder import finished, run_folder
from latentact.training.settings import TrainingConfig
from latentact.types import ActionSpace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GroundConfig:
    """Learn a decoder from latent to robot actions on the labeled episodes; fine-tune on them if wanted."""

    RENAMED: ClassVar = {"labelled_episodes": "labeled_episodes"}

    out: str = "runs/ground"
    """Run folder; the same command goes on where a killed run stopped."""
    policy: str
    """Folder of the latent policy."""
    labels: str
    """Folder of the labels it was trained on, of data with robot actions."""
    labeled_episodes: int = 5
    """k: training episodes whose actions are used."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, batch_size=64, lr=1e-3, eval_every=0)
    )
    """How the decoder is trained."""
    finetune_steps: int = 0
    """Steps in which policy and decoder are then trained on end to end; 0: not at all."""
    finetune_lr: float = 1e-4
    """Peak learning rate of those steps."""
    self_training: bool = False
    """Whether they learn from all training episodes: on those without labels from the actions that a small
    head on the latent policy's features names, which itself learned from the labeled episodes only."""
    held_out: float = 0.1
    """Share of the episodes that training never sees; as in train-lam and train-policy."""
    split_seed: int = 0
    """Seed of the choice of held-out and labeled episodes; as in train-lam and train-policy."""

    def __post_init__(self) -> None:
        """Validate the numbers."""
        require_between("split_seed", self.split_seed, 0, LARGEST)
        require_between("finetune_steps", self.finetune_steps, 0, 10**9)
        require_between("finetune_lr", self.finetune_lr, 1e-12, 100)


def run(config: GroundConfig, out: Path) -> Path:
    """Ground a policy; returns its folder."""
    if finished(out, config, "ground.json"):
        return out
    latent = Policy.from_pretrained(config.policy)
    labels, store = read_labels(config.labels)
    if latent.latent is None:
        raise UserError(
            f"{config.policy} predicts robot actions already; ground takes a policy of latent actions."
        )
    latent.latent.check_compatible(labels.spec, "the policy", "the labels")
    if store.action_space is None:
        raise UserError(f"{store.path} has no robot actions to ground in; give labels of data that has some.")
    train, held_out = split_episodes(store, held_out=config.held_out, seed=config.split_seed)
    labeled = choose_labeled(train, config.labeled_episodes, config.split_seed)

    torch.manual_seed(config.training.seed)
    policy = latent.ground(config.decoder, store.action_space)
    steps = _labeled_steps(store, labels, labeled)
    if not len(steps):
        raise UserError(
            f"{len(labeled)} labeled episodes hold no latent action; give a larger labeled_episodes."
        )
    assert policy.decoder is not None
    policy.decoder.set_action_stats(np.ma.getdata(store.actions(labeled))[steps])
    pairs = _Pairs(policy, store, labels, steps, labeled)
    log.info("%d labeled steps of %d episodes", len(pairs), len(labeled))
    with run_folder(out, config):
        fit(_Decoding(policy), pairs, config.training, out)
        judged = _Pairs(policy, store, labels, _labeled_steps(store, labels, held_out), held_out)
        result = {"labeled_steps": len(pairs), "held_out_score": judged.score(policy)}
        policy.write(out)
        if config.finetune_steps:
            result["finetuned"] = str(_finetune(config, policy, store, train, labeled, out / "finetuned"))
        write_json(out / "ground.json", result)
    return out


def _finetune(
    config: GroundConfig,
    policy: Policy,
    store: FrameStore,
    train: np.ndarray,
    labeled: np.ndarray,
    out: Path,
) -> Path:
    """Train network and decoder from observation to robot action."""
    tuned = deepcopy(policy)
    actions = store.actions(labeled)
    if config.self_training:
        episodes = train
        actions = _pseudo_actions(config, policy, store, train, actions, out / "teacher")
    else:
        episodes = labeled
    exists = np.isin(store.episode, episodes)
    exists[store.starts + store.lengths - 1] = False
    network, stride = tuned.config.network, tuned.spec.stride
    samples = PolicySamples(
        store,
        target=np.ma.getdata(actions).reshape(len(actions), -1),
        exists=exists,
        frames=network.n_obs_steps,
        chunk=network.chunk_size * stride,
        stride=1,
        words=tuned.spec.words,
    )
    samples.past = samples.past * stride
    out.mkdir(parents=True, exist_ok=True)
    training = replace(config.training, steps=config.finetune_steps, lr=config.finetune_lr)
    fit(_EndToEnd(tuned), samples, training, out)
    tuned.write(out)
    return out.relative_to(out.parent)


def _pseudo_actions(
    config: GroundConfig, policy: Policy, store: FrameStore, train: np.ndarray, known: np.ndarray, out: Path
) -> np.ndarray:
    """Return robot actions for every training step: the known ones, and a teacher's where they are hidden.

    The teacher is a head on the frozen features of the latent policy. Those features were learned from every
    step's latent action, so few labels suffice to read the action from them.
    """
    assert policy.spec.action_space is not None
    rows = np.flatnonzero(np.isin(store.episode, train))
    features = _features(policy, store, rows)
    hidden = ~known_rows(known)[rows]
    last = np.isin(rows, store.starts + store.lengths - 1)
    shown = torch.from_numpy(~hidden & ~last)
    known = np.ma.getdata(known)
    actions = torch.from_numpy(known[rows])
    torch.manual_seed(config.training.seed)
    teacher = _Teacher(features, actions[shown], policy.spec.action_space)
    fit(teacher, _Pool(features[shown], None, actions[shown]), config.training, out)
    with torch.inference_mode():
        named = teacher.cpu().actions(features)
    filled = known.copy()
    filled[rows[hidden]] = named.numpy()[hidden]
    return filled


@torch.inference_mode()
def _features(policy: Policy, store: FrameStore, rows: np.ndarray) -> Tensor:
    """What the policy's network makes of the observation at each row, ``[m, 256]``."""
    network = policy.config.network
    nothing = np.zeros((len(store.frames), 1), np.float32)
    samples = PolicySamples(
        store,
        target=nothing,
        exists=np.ones(len(nothing), bool),
        frames=network.n_obs_steps,
        stride=policy.spec.stride,
        words=policy.spec.words,
    )
    parts = []
    for some in np.array_split(rows, -(-len(rows) // 512)):
        batch = samples.batch(some)
        parts.append(policy.eval().features(batch.frames, batch.state, batch.words).float())
    return torch.cat(parts).clone()


class _Teacher(nn.Module):
    """Robot actions from standardized features; dropout keeps it modest on few labels."""

    mean: Tensor
    std: Tensor
    action_mean: Tensor
    action_std: Tensor

    def __init__(self, features: Tensor, actions: Tensor, space: ActionSpace) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0) + 1e-3)
        numbers = (actions.mean(0), actions.std(0).clamp(min=1e-4)) if not space.discrete else (0.0, 1.0)
        self.register_buffer("action_mean", torch.as_tensor(numbers[0]))
        self.register_buffer("action_std", torch.as_tensor(numbers[1]))
        width = features.shape[1]
        self.net = nn.Sequential(
            *(nn.Linear(width, 128), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, space.size)),
        )

    def scores(self, features: Tensor) -> Tensor:
        return self.net((features - self.mean) / self.std).float()

    def loss(self, pair: _Pair) -> tuple[Tensor, dict[str, Tensor]]:
        actions = pair.actions
        if not self.space.discrete:
            actions = (actions - self.action_mean) / self.action_std
        labeled = torch.ones(len(actions), dtype=torch.bool, device=actions.device)
        return action_loss(self.scores(pair.latents), actions, labeled), {}

    def actions(self, features: Tensor) -> Tensor:
        scores = self.eval().scores(features)
        return scores.argmax(1) if self.space.discrete else scores * self.action_std + self.action_mean


def _labeled_steps(store: FrameStore, labels: Labels, episodes: np.ndarray) -> np.ndarray:
    """Rows of the given episodes that have a latent action, and robot actions for the whole of its gap."""
    known, rows = known_rows(store.actions(episodes)), np.flatnonzero(labels.valid)
    return rows[known[rows[:, None] + np.arange(labels.spec.frame_gap)].all(1)]


class _Pool(Dataset):
    """(input, state, robot actions) of labeled rows, in memory."""

    def __init__(self, latents: Tensor, state: Tensor | None, actions: Tensor) -> None:
        self.latents, self.state, self.actions = latents, state, actions

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, positions: list[int]) -> _Pair:
        state = None if self.state is None else self.state[positions]
        return _Pair(self.latents[positions], state, self.actions[positions])


class _Pairs(_Pool):
    """Latent actions in the decoder's form, and the robot actions of their frame gap."""

    def __init__(
        self, policy: Policy, store: FrameStore, labels: Labels, rows: np.ndarray, episodes: np.ndarray
    ) -> None:
        target = getattr(labels, policy.config.target)  # type: ignore[attr-defined]
        latents = torch.from_numpy(target[rows]).flatten(1)
        if policy.spec.target.kind == "numbers":
            latents = (latents - policy.mean) / policy.std
        else:
            latents = nn.functional.one_hot(latents, policy.spec.target.size).flatten(1).float()
        ahead = rows[:, None] + np.arange(policy.spec.stride)
        state = None if store.state is None else policy.normal_state(torch.from_numpy(store.state[rows]))
        super().__init__(latents, state, torch.from_numpy(np.ma.getdata(store.actions(episodes))[ahead]))

    @torch.no_grad()
    def score(self, policy: Policy) -> float | None:
        """Accuracy, or R2 of continuous actions, on these rows."""
        if not len(self):
            return None
        assert policy.decoder is not None
        scores = policy.decoder(
            self.latents[:, None], self.state if policy.decoder.config.use_state else None
        )
        if policy.decoder.space.discrete:
            return (scores.argmax(-1) == self.actions).float().mean().item()
        error = (policy.decoder.unnormalize(scores) - self.actions).square().sum()
        return 1 - (error / (self.actions - self.actions.mean((0, 1))).square().sum()).item()


@dataclass(frozen=True)
class _Pair:
    latents: Tensor
    state: Tensor | None
    actions: Tensor

    def to(self, device: str) -> _Pair:
        state = None if self.state is None else self.state.to(device)
        return _Pair(self.latents.to(device), state, self.actions.to(device))


class _Decoding(nn.Module):
    """Trains the decoder alone."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        assert policy.decoder is not None
        self.decoder = policy.decoder

    def loss(self, pair: _Pair) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.decoder(pair.latents[:, None], pair.state if self.decoder.config.use_state else None)
        return self.decoder.action_loss(
            scores, pair.actions, torch.ones_like(scores[..., 0], dtype=torch.bool)
        ), {}


class _EndToEnd(nn.Module):
    """Trains network and decoder from observations to robot actions."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def loss(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        decoder = self.policy.decoder
        assert decoder is not None
        actions = batch.target[..., 0] if decoder.space.discrete else batch.target
        return decoder.action_loss(self.policy.action_scores(batch), actions, batch.mask), {}
