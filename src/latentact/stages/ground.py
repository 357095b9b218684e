"""Learn latent action -> robot action from few labeled episodes: `latentact ground policy=DIR labels=DIR`.

The folder holds the policy with its decoder; with `finetune_steps`, the subfolder `finetuned` holds the same
policy after end-to-end fine-tuning. `mode=online` learns from an environment's reward, without labels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentact.config import LARGEST, OneOf, choice
from latentact.data.latents import Labels, read_labels
from latentact.data.plan import read_plan
from latentact.data.samples import LabeledBatch, LabeledRows
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.store import FrameStore, known_rows
from latentact.errors import UserError, require_between, require_one_of
from latentact.io.atomic import write_json
from latentact.policies.contract import Policy
from latentact.policies.decoder import ActionDecoder, DecoderConfig
from latentact.stages.finetune import finetune
from latentact.stages.ground_online import OnlineConfig, check_online, ground_online, load_matching_lam
from latentact.training.cluster.contract import CLUSTERS, ClusterStage
from latentact.training.fit import fit
from latentact.training.run_folder import finished, run_folder
from latentact.training.settings import TrainingConfig

log = logging.getLogger(__name__)

MODES = ("offline", "online")


@dataclass(frozen=True, kw_only=True)
class GroundConfig(ClusterStage):
    """Learn a decoder from latent to robot actions on the labeled episodes; then fine-tune, if configured."""

    RENAMED: ClassVar = {"labelled_episodes": "labeled_episodes"}

    ONE_PROCESS: ClassVar = True

    out: str = "runs/ground"
    """Run folder; re-run the same command to resume."""
    policy: str
    """Folder of the latent policy."""
    labels: str
    """Folder of the labels that it was trained on; offline, their data must have robot actions."""
    mode: Annotated[str, OneOf(MODES)] = "offline"
    """offline: on labeled episodes; online: by PPO in `online.env`, for its reward."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    """mode=online: environment and PPO."""
    labeled_episodes: int = 5
    """k: training episodes whose actions are used."""
    plan: str = ""
    """File of `latentact plan` whose first k episodes are labeled; empty: drawn by `split_seed`."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, batch_size=64, lr=1e-3, eval_every=0)
    )
    """Training of the decoder."""
    cluster: Any = choice(CLUSTERS, "local")
    """Where to run it; in one process."""
    finetune_steps: int = 0
    """Steps of the subsequent end-to-end fine-tuning; 0: none."""
    finetune_lr: float = 1e-4
    """Peak learning rate of those steps."""
    self_training: bool = False
    """Whether fine-tuning uses all training episodes: episodes without labels get the actions of a
    small head on the latent policy's frozen features and the latent actions, trained on the labeled
    episodes."""
    held_out: float = 0.1
    """Fraction of held-out episodes; as in train-lam and train-policy."""
    split_seed: int = 0
    """Seed of the choice of held-out and labeled episodes; as in train-lam and train-policy."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("mode", self.mode, MODES)
        if self.mode == "offline":
            require_between("labeled_episodes", self.labeled_episodes, 1, 10**9)
        require_between("split_seed", self.split_seed, 0, LARGEST)
        if self.plan and self.mode == "online":
            raise UserError(
                f"plan must be empty for mode=online, which needs no labels, got {self.plan}. Leave it out."
            )
        require_between("finetune_steps", self.finetune_steps, 0, 10**9)
        require_between("finetune_lr", self.finetune_lr, 1e-12, 100)
        if self.training.augment.inputs and not self.finetune_steps:
            raise UserError(
                "training.augment must be off without finetune_steps, because the decoder learns from latent "
                f"actions, got {sorted(self.training.augment.inputs)}. Set finetune_steps=N."
            )


def run(config: GroundConfig, out: Path) -> Path:
    """Ground a policy; return its folder."""
    if finished(out, config, "ground.json"):
        return out
    latent = Policy.from_pretrained(config.policy)
    labels, store = read_labels(config.labels)
    if latent.latent is None or not latent.targets.latent:
        raise UserError(
            f"{config.policy} must be a latent policy, got one that predicts robot actions. Give the folder "
            "of a train-policy run with policy=latent."
        )
    latent.latent.check_compatible(labels.spec, "the policy", "the labels")
    if config.mode == "online":
        return _online(config, latent, labels, out)
    if store.action_space is None:
        raise UserError(
            f"{store.path} must have robot actions, got none. Give labels of data with robot actions."
        )
    if config.decoder.use_state and store.state is None:
        raise UserError(
            f"decoder.use_state must be false for {store.path}, which has no observation.state, got true."
        )
    train, held_out = split_episodes(store, held_out=config.held_out, seed=config.split_seed)
    labeled = choose_labeled(train, config.labeled_episodes, config.split_seed, read_plan(config.plan, store))

    torch.manual_seed(config.training.seed)
    states = None if store.state is None else store.state[np.isin(store.episode, labeled)]
    policy = latent.ground(config.decoder, store.action_space, states, store.camera)
    steps = _labeled_steps(store, labels, labeled)
    if not len(steps):
        raise UserError(
            f"labeled_episodes must include a step with a latent action, got none in {len(labeled)} labeled "
            "episodes. Increase it."
        )
    assert policy.decoder is not None
    policy.decoder.set_action_stats(np.ma.getdata(store.actions(labeled))[steps])
    _set_codebook(policy, labels)
    pairs = _latent_actions(policy, store, labels, steps, labeled)
    log.info("%d labeled steps of %d episodes", len(pairs), len(labeled))
    with run_folder(out, config):
        fit(_DecoderTraining(policy.decoder), pairs, config.training.plain, out)
        unseen = _latent_actions(policy, store, labels, _labeled_steps(store, labels, held_out), held_out)
        result: dict[str, Any] = {
            "labeled_steps": len(pairs),
            "held_out_score": _score(policy.decoder, unseen),
        }
        policy.cpu().write(out)
        if config.finetune_steps:
            training = replace(config.training, steps=config.finetune_steps, lr=config.finetune_lr)
            teacher = config.training if config.self_training else None
            latents = _all_latents(labels, policy.targets.column) if teacher else None
            finetune(policy, store, train, labeled, training, teacher, out / "finetuned", latents=latents)
            result["finetuned"] = "finetuned"
        write_json(out / "ground.json", result)
    return out


def _online(config: GroundConfig, latent: Policy, labels: Labels, out: Path) -> Path:
    """Ground a policy by reward; return its folder."""
    online = config.online
    if config.training.smoke_test:
        online = replace(
            online, play_steps=64, steps=64, finetune_steps=min(online.finetune_steps, 64), envs=2, episodes=2
        )
        online = replace(online, rollout_steps=16, max_steps=online.max_steps or 20)
    if config.decoder.use_state and not latent.spec.state_size:
        raise UserError(
            f"decoder.use_state must be false for mode=online with {config.policy}, which was trained "
            "without observation.state, got true."
        )
    env, lam = check_online(online, latent, config.policy), load_matching_lam(online, latent)
    torch.manual_seed(config.training.seed)
    policy = latent.ground(config.decoder, env.action_space)
    _set_codebook(policy, labels)
    with run_folder(out, config):
        result = ground_online(online, policy, lam, _fit(config.training), config.training.seed, out)
        write_json(out / "ground.json", result)
    return out


def _fit(training: TrainingConfig) -> Callable[[ActionDecoder, LabeledRows, Path], None]:
    return lambda decoder, pairs, folder: fit(_DecoderTraining(decoder), pairs, training, folder)


def _set_codebook(policy: Policy, labels: Labels) -> None:
    """Set the codebook of a decoder that takes codes."""
    assert policy.decoder is not None
    if policy.decoder.config.mixture:
        assert labels.codes is not None
        policy.decoder.set_codebook(labels.codes[labels.valid, 0], labels.vectors[labels.valid, 0])


def _labeled_steps(store: FrameStore, labels: Labels, episodes: np.ndarray) -> np.ndarray:
    """Return the rows of given episodes that have a latent action, and robot actions for its whole gap."""
    known, rows = known_rows(store.actions(episodes)), np.flatnonzero(labels.valid)
    return rows[known[rows[:, None] + np.arange(labels.spec.frame_gap)].all(1)]


def _latent_actions(
    policy: Policy, store: FrameStore, labels: Labels, rows: np.ndarray, episodes: np.ndarray
) -> LabeledRows:
    """Return latent actions as inputs of the decoder, and the robot actions of their frame gap."""
    column = getattr(labels, policy.targets.column)
    latents = policy.normal_latent(torch.from_numpy(column[rows]).flatten(1))
    ahead = rows[:, None] + np.arange(policy.spec.stride)
    state = None
    if policy.decoder is not None and policy.decoder.config.use_state and store.state is not None:
        state = policy.normal_state(torch.from_numpy(store.state[rows]))
    return LabeledRows(latents, state, torch.from_numpy(np.ma.getdata(store.actions(episodes))[ahead]))


def _all_latents(labels: Labels, column: str) -> Float[Tensor, "n f"]:
    """Return the latent action of every row, NaN where there is none."""
    values = labels.vectors if column == "codes" else getattr(labels, column)
    invalid = torch.from_numpy(~labels.valid)
    return torch.from_numpy(values).flatten(1).masked_fill(invalid[:, None], torch.nan)


@torch.no_grad()
def _score(decoder: ActionDecoder, data: LabeledRows) -> float | None:
    """Return the accuracy, or R2 of continuous actions; None without data."""
    if not len(data):
        return None
    decoder = decoder.cpu()
    scores = decoder(data.inputs[:, None], data.state if decoder.config.use_state else None)
    if decoder.space.discrete:
        return (scores.argmax(-1) == data.actions).float().mean().item()
    error = (decoder.unnormalize(scores) - data.actions).square().sum()
    return 1 - (error / (data.actions - data.actions.mean((0, 1))).square().sum()).item()


class _DecoderTraining(nn.Module):
    """Train the decoder only."""

    def __init__(self, decoder: ActionDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def loss(self, batch: LabeledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of robot actions."""
        state = batch.state if self.decoder.config.use_state else None
        scores = self.decoder(batch.inputs[:, None], state)
        labeled = torch.ones_like(scores[..., 0], dtype=torch.bool)
        return self.decoder.action_loss(scores, batch.actions, labeled), {}
