"""Learn a policy from latent labels or from robot actions: `latentact train-policy labels=DIR`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from latentact.config import LARGEST, choice
from latentact.data.cache import DataConfig, FrameStore, open_store
from latentact.data.latents import Labels, read_labels
from latentact.data.samples import PolicySamples, vocabulary
from latentact.data.splits import choose_labeled, split_episodes
from latentact.errors import UserError, require_between
from latentact.io.atomic import write_json
from latentact.policies.contract import POLICIES, Policy, PolicySpec, Target
from latentact.policies.guided import GuidedConfig
from latentact.policies.latent import LatentConfig
from latentact.training.fit import fit
from latentact.training.run_folder import finished, run_folder
from latentact.training.settings import TrainingConfig, require_trainable_size
from latentact.types import ActionSpace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainPolicyConfig:
    """Learn a policy from latent labels (latent), robot or an IDM's actions (bc), or both (guided)."""

    RENAMED: ClassVar = {"labelled_episodes": "labeled_episodes"}

    out: str = "runs/train_policy"
    """Run folder; the same command goes on where a killed run stopped."""
    labels: str = ""
    """Folder that `latentact label` wrote; its data is used."""
    data: DataConfig = field(default_factory=lambda: DataConfig(path=""))
    """Data with robot actions, for policy=bc without labels."""
    policy: Any = choice(POLICIES, "latent")
    """Which policy."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=60_000, lr=2e-4))
    """How it is trained."""
    held_out: float = 0.1
    """Share of the episodes that training never sees."""
    split_seed: int = 0
    """Seed of the choice of held-out and labeled episodes."""
    labeled_episodes: int | None = None
    """k: training episodes that policy=bc and policy=guided learn from; empty: all."""

    def __post_init__(self) -> None:
        """Validate the numbers."""
        require_between("split_seed", self.split_seed, 0, LARGEST)


def run(config: TrainPolicyConfig, out: Path) -> Path:
    """Train and save a policy; returns its folder."""
    if not config.labels and not config.data.path:
        raise UserError("nothing to learn from; give labels=DIR, or data.path=DIR with policy=bc.")
    if finished(out, config, "policy.json"):
        return out
    labels, store = read_labels(config.labels) if config.labels else (None, open_store(config.data))
    train, held_out = split_episodes(store, held_out=config.held_out, seed=config.split_seed)
    guide = None
    if isinstance(config.policy, GuidedConfig):
        if labels is None:
            raise UserError("policy=guided is guided by latent labels; give labels=DIR.")
        guide = config.policy.guide(labels.spec)
    if isinstance(config.policy, LatentConfig):
        if labels is None:
            raise UserError("policy=latent learns from latent labels; give labels=DIR.")
        target, values, exists = _latent_targets(config.policy, labels)
        space, stride = None, labels.spec.frame_gap
    else:
        pseudo = None if guide else labels
        if pseudo is None:
            train = choose_labeled(train, config.labeled_episodes, config.split_seed)
        target, values, exists, space = _action_targets(pseudo, store, train, held_out)
        stride = 1

    torch.manual_seed(config.training.seed)
    words = vocabulary(store.task_texts)
    spec = PolicySpec(
        resolution=store.frames.shape[1],
        channels=store.frames.shape[3],
        state_size=0 if store.state is None else store.state.shape[1],
        words=words,
        target=target,
        action_space=space,
        stride=stride,
        fps=store.fps,
        camera=store.camera,
        guide=guide,
    )
    latent = labels.spec if labels and (guide or space is None) else None
    try:
        require_trainable_size(
            lambda: Policy(config.policy, spec, latent),
            f"policy={config.policy.kind}",
            config.training.device,
        )
        policy = Policy(config.policy, spec, latent)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(
            f"policy={config.policy.kind} cannot be built with these settings: {first}."
        ) from error
    rows = exists & store.usable & np.isin(store.episode, train)
    network = config.policy.network
    shape: dict[str, Any] = {
        "frames": network.n_obs_steps,
        "chunk": network.chunk_size,
        "stride": stride,
        "words": words,
    }
    tokens = None
    if guide and labels:
        tokens = getattr(labels, guide.tokens).reshape(len(labels.valid), -1)
        shape |= {"guide": (tokens, labels.valid), "offsets": guide.offsets}
        tokens = tokens[rows & labels.valid]
    policy.set_action_stats(values[rows], None if store.state is None else store.state[rows], tokens)
    samples = PolicySamples(store, target=values, exists=rows, **shape)
    log.info("%d steps of %d episodes to learn from", len(samples), len(train))

    def judge(_: bool = True) -> dict[str, float]:
        unseen = exists & store.usable & np.isin(store.episode, held_out)
        if not unseen.any():
            return {}
        others = PolicySamples(store, target=values, exists=unseen, **shape)
        batch = others.batch(others.rows[:: max(1, len(others.rows) // 512)])
        device = next(policy.parameters()).device
        return {"val/loss": policy.loss(batch.to(device))[0].item()}

    with run_folder(out, config):
        fit(policy, samples, config.training, out, judge)
        policy.cpu().write(out)
        write_json(out / "policy.json", {"samples": len(samples), "episodes": len(train), **judge()})
    return out


def _latent_targets(config: LatentConfig, labels: Labels) -> tuple[Target, np.ndarray, np.ndarray]:
    target = config.latent_target(labels.spec)
    values = getattr(labels, config.target)
    return target, values.reshape(len(values), -1), labels.valid


def _action_targets(
    labels: Labels | None, store: FrameStore, episodes: np.ndarray, held_out: np.ndarray
) -> tuple[Target, np.ndarray, np.ndarray, ActionSpace]:
    """Robot actions of the given and the held-out episodes (for validation), or an IDM's pseudo-actions."""
    space = store.action_space
    if space is None:
        raise UserError(f"{store.path} has no robot actions; give labels=DIR with policy=latent.")
    if labels is None:
        shown = np.concatenate([episodes, held_out])
        values = np.ma.getdata(store.actions(shown))
        values = values.reshape(len(values), -1)
        exists = np.isin(store.episode, shown)
        exists[store.starts + store.lengths - 1] = False
    elif not labels.spec.robot_actions or labels.spec.frame_gap != 1:
        raise UserError(
            f"policy=bc learns from robot actions and these labels are latent actions of "
            f"{labels.spec.model}; use policy=latent, or label with a LAM of lam=idm."
        )
    else:
        values = labels.vectors[:, 0] if labels.codes is None else labels.codes
        exists = labels.valid
    if space.discrete:
        return Target(kind="classes", size=space.size), values, exists, space
    return Target(kind="numbers", size=space.size), values, exists, space
