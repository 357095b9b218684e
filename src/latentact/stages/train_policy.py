"""Learn a policy from latent labels or from robot actions: `latentact train-policy labels=DIR`."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from latentact.config import LARGEST, choice
from latentact.data.latents import Labels, read_labels
from latentact.data.mixture import TrainingDataConfig, open_training_store
from latentact.data.plan import read_plan
from latentact.data.samples import PolicySamples, vocabulary
from latentact.data.splits import choose_labeled, training_episodes
from latentact.data.store import FrameStore, flagged_rows
from latentact.errors import UserError, require_between
from latentact.io.atomic import write_json
from latentact.policies.contract import POLICIES, Policy, PolicyConfig
from latentact.policies.spec import PolicySpec, Targets
from latentact.training.cluster.contract import CLUSTERS, ClusterStage
from latentact.training.fit import fit
from latentact.training.run_folder import finished, run_folder
from latentact.training.settings import TrainingConfig, require_trainable_size
from latentact.types import LatentActionSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainPolicyConfig(ClusterStage):
    """Learn a policy from latent actions (latent), robot or an IDM's actions (bc), or both (guided)."""

    RENAMED: ClassVar = {"labelled_episodes": "labeled_episodes"}

    out: str = "runs/train_policy"
    """Run folder; re-run the same command to resume."""
    labels: str = ""
    """Folder that `latentact label` wrote; its data is used."""
    data: TrainingDataConfig = field(default_factory=TrainingDataConfig)
    """Data with robot actions, for policy=bc without labels."""
    policy: Any = choice(POLICIES, "latent")
    """Which policy."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=60_000, lr=2e-4))
    """How it is trained."""
    cluster: Any = choice(CLUSTERS, "local")
    """Where to run it."""
    held_out: float = 0.1
    """Fraction of the episodes that training never uses; 0: none of them."""
    only: str = ""
    """Column of true and false in the data: only steps where it is true are learned from, as `intervention`
    of LeRobot's take-overs; empty: all."""
    split_seed: int = 0
    """Seed of the choice of held-out and labeled episodes."""
    labeled_episodes: int | None = None
    """k: training episodes that policy=bc and policy=guided learn from; empty: all, or all of the plan."""
    plan: str = ""
    """File of `latentact plan` whose first k episodes are labeled; empty: drawn by `split_seed`."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_between("split_seed", self.split_seed, 0, LARGEST)


def run(config: TrainPolicyConfig, out: Path) -> Path:
    """Train and save a policy; return its folder."""
    if not config.labels and not config.data.path and not config.data.mixture:
        raise UserError(
            "labels or data.path must be set, got nothing to learn from. Give labels=DIR, or data.path=DIR "
            "with policy=bc."
        )
    if finished(out, config, "policy.json"):
        return out
    labels, store = read_labels(config.labels) if config.labels else (None, open_training_store(config.data))
    train, held_out = training_episodes(store, held_out=config.held_out, seed=config.split_seed)
    learns = config.policy.targets(labels.spec if labels else None, store.action_space)
    if config.plan and (learns.latent or (labels and not learns.guide)):
        raise UserError(
            f"plan must be empty where all episodes have labels, got {config.plan}. Leave it out."
        )
    if learns.latent:
        assert labels is not None
        column = getattr(labels, learns.column)
        values, exists = column.reshape(len(column), -1), labels.valid
    elif labels and not learns.guide:
        values, exists = _labeled_actions(labels, config.policy.kind)
    else:
        train = choose_labeled(
            train, config.labeled_episodes, config.split_seed, read_plan(config.plan, store)
        )
        values, exists = _robot_actions(store, train, held_out)

    torch.manual_seed(config.training.seed)
    network = config.policy.network
    spec = _policy_spec(store, learns, labels.spec.frame_gap if labels and learns.latent else 1)
    latent = labels.spec if labels and (learns.latent or learns.guide) else None
    policy = _built(config.policy, spec, latent, config.training.device)
    exists &= flagged_rows(store, config.only)
    rows = exists & store.usable & np.isin(store.episode, train)
    shape: dict[str, Any] = {
        "frames": network.n_obs_steps,
        "chunk": network.chunk_size,
        "stride": spec.stride,
        "words": spec.words,
    }
    tokens = None
    if labels and learns.guide:
        tokens = getattr(labels, learns.guide.tokens).reshape(len(labels.valid), -1)
        shape |= {"guide": (tokens, labels.valid), "offsets": learns.guide.offsets}
        tokens = tokens[rows & labels.valid]
    policy.set_action_stats(values[rows], None if store.state is None else store.state[rows], tokens)
    samples = PolicySamples(store, target=values, exists=rows, **shape)
    if count := policy.initialized_by:
        policy.initialize(samples.batch(samples.rows[:: math.ceil(len(samples.rows) / count)]))
    log.info("%d steps of %d episodes to learn from", len(samples), len(train))

    def evaluate(_: bool = True) -> dict[str, float]:
        unseen = exists & store.usable & np.isin(store.episode, held_out)
        if not unseen.any():
            return {}
        others = PolicySamples(store, target=values, exists=unseen, **shape)
        batch = others.batch(others.rows[:: max(1, len(others.rows) // 512)])
        device = next(policy.parameters()).device
        return {"val/loss": policy.loss(batch.to(device))[0].item()}

    with run_folder(out, config):
        fit(
            policy,
            samples,
            config.training,
            out,
            evaluate,
            augments=policy.augments,
            state_std=policy.state_std,
        )
        policy.cpu().write(out)
        write_json(out / "policy.json", {"samples": len(samples), "episodes": len(train), **evaluate()})
    return out


def _policy_spec(store: FrameStore, learns: Targets, stride: int) -> PolicySpec:
    """Return the inputs and outputs of a policy for this data."""
    return PolicySpec(
        resolution=store.frames.shape[1],
        channels=store.frames.shape[3],
        state_size=0 if store.state is None else store.state.shape[1],
        words=vocabulary(store.task_texts),
        target=learns.target,
        action_space=None if learns.latent else store.action_space,
        stride=stride,
        fps=store.fps,
        camera=store.camera,
        guide=learns.guide,
    )


def _built(config: PolicyConfig, spec: PolicySpec, latent: LatentActionSpec | None, device: str) -> Policy:
    """Return the policy with random weights.

    Raises:
        UserError: it cannot be built with its settings, or is too large for the device.
    """
    try:
        require_trainable_size(lambda: config.build(spec, latent), f"policy={config.kind}", device)
        return config.build(spec, latent)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"policy={config.kind} cannot be built with these settings: {first}.") from error


def _robot_actions(
    store: FrameStore, episodes: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the robot actions of given episodes and, for validation, held-out ones; and where they exist."""
    used = np.concatenate([episodes, held_out])
    values = np.ma.getdata(store.actions(used))
    exists = np.isin(store.episode, used)
    exists[store.starts + store.lengths - 1] = False
    return values.reshape(len(values), -1), exists


def _labeled_actions(labels: Labels, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the robot actions that an inverse dynamics model gave every step, and where they exist."""
    if not labels.spec.robot_actions:
        raise UserError(
            f"labels must be robot actions for policy={kind}, got latent actions of {labels.spec.model}. Use "
            "policy=latent, or label with a model of lam=idm."
        )
    if labels.spec.frame_gap != 1:
        raise UserError(
            f"labels must have a frame gap of 1 for policy={kind}, one robot action per step, got "
            f"{labels.spec.frame_gap}. Train lam=idm without frame_gap_s."
        )
    return labels.vectors[:, 0] if labels.codes is None else labels.codes, labels.valid
