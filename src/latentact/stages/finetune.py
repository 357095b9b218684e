"""Fine-tune a policy end to end on robot actions of few labeled episodes, with self-training if configured.

`ground` fine-tunes grounded policies; `compare` also fine-tunes the baselines, so that every method gets the
same number of updates.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from latentact.config import LARGEST
from latentact.data.cache import DataConfig, open_store
from latentact.data.plan import read_plan
from latentact.data.samples import LabeledRows, PolicyBatch, PolicySamples
from latentact.data.splits import choose_labeled, training_episodes
from latentact.data.store import FrameStore, flagged_rows, known_rows
from latentact.errors import UserError, require_between
from latentact.io.atomic import write_json
from latentact.policies.contract import Policy
from latentact.training.action_head import ActionHead, policy_features
from latentact.training.fit import fit
from latentact.training.run_folder import finished, run_folder
from latentact.training.settings import TrainingConfig
from latentact.types import ActionSpace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a policy that outputs robot actions on the labeled episodes."""

    out: str = "runs/finetune"
    """Run folder; re-run the same command to resume."""
    policy: str
    """Folder of the policy."""
    data: DataConfig
    """Data with robot actions."""
    labeled_episodes: int | None = 5
    """k: training episodes whose actions are used; empty: all."""
    plan: str = ""
    """File of `latentact plan` whose first k episodes are labeled; empty: drawn by `split_seed`."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=500, batch_size=64, lr=1e-4, eval_every=0)
    )
    """Its training."""
    self_training: bool = False
    """Whether to use all training episodes, with the actions of a teacher where they are hidden."""
    teacher_training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, batch_size=64, lr=1e-3, eval_every=0)
    )
    """Training of the teacher."""
    held_out: float = 0.1
    """Fraction of the episodes that training never uses; as in train-policy."""
    only: str = ""
    """Column of true and false in the data: only steps where it is true are learned from; empty: all."""
    split_seed: int = 0
    """Seed of the choice of held-out and labeled episodes; as in train-policy."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_between("split_seed", self.split_seed, 0, LARGEST)


def run(config: FinetuneConfig, out: Path) -> Path:
    """Fine-tune and save a policy; return its folder."""
    if finished(out, config, "finetune.json"):
        return out
    policy, store = Policy.from_pretrained(config.policy), open_store(config.data)
    if policy.spec.action_space is None:
        raise UserError(
            f"{config.policy} must output robot actions, got latent actions. Ground it first: latentact "
            "ground --help."
        )
    if store.action_space != policy.spec.action_space:
        raise UserError(
            f"{config.policy} outputs {policy.spec.action_space}, but {store.path} has "
            f"{store.action_space or 'no robot actions'}; give the data that it was trained on."
        )
    train, _ = training_episodes(store, held_out=config.held_out, seed=config.split_seed)
    labeled = choose_labeled(train, config.labeled_episodes, config.split_seed, read_plan(config.plan, store))
    teacher = config.teacher_training if config.self_training else None
    with run_folder(out, config):
        finetune(policy, store, train, labeled, config.training, teacher, out, config.only)
        write_json(out / "finetune.json", {"labeled_episodes": len(labeled), "steps": config.training.steps})
    return out


def finetune(
    policy: Policy,
    store: FrameStore,
    train: np.ndarray,
    labeled: np.ndarray,
    training: TrainingConfig,
    teacher: TrainingConfig | None,
    out: Path,
    only: str = "",
    latents: Float[Tensor, "n f"] | None = None,
) -> None:
    """Train a copy of a policy from observations to robot actions and write it into `out`.

    Args:
        policy: policy that outputs robot actions.
        store: the data.
        train: training episodes.
        labeled: those among them whose actions are used.
        training: how the policy is trained.
        teacher: how the teacher of self-training is trained; None: learn from the labeled episodes only.
        out: folder.
        only: column of the steps that are learned from; empty: all.
        latents: latent action of every row, which the teacher also takes; NaN: none.
    """
    tuned, actions, episodes = deepcopy(policy), store.actions(labeled), labeled
    if teacher:
        episodes = train
        actions = _pseudo_actions(policy, store, train, actions, teacher, out / "teacher", latents)
    exists = np.isin(store.episode, episodes) & flagged_rows(store, only)
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
    fit(_EndToEnd(tuned), samples, training, out, augments=tuned.augments, state_std=tuned.state_std)
    tuned.cpu().write(out)


def _pseudo_actions(
    policy: Policy,
    store: FrameStore,
    train: np.ndarray,
    known: np.ma.MaskedArray,
    training: TrainingConfig,
    out: Path,
    latents: Float[Tensor, "n f"] | None = None,
) -> np.ndarray:
    """Return robot actions of every training step: known ones, or predictions of a teacher.

    The teacher is a head on the policy's frozen features and, if given, the latent actions. A latent policy
    learned its features from the latent actions of every step, so few labels suffice to predict actions from
    them; the latent action separates the actions that are possible after one observation.
    """
    assert policy.spec.action_space is not None
    rows = np.flatnonzero(np.isin(store.episode, train))
    last = np.isin(rows, store.starts + store.lengths - 1)
    features, size, unlearned = policy_features(policy, store, rows), 0, last
    if latents is not None:
        chosen = latents[rows]
        missing = chosen.isnan().any(1)
        chosen = torch.where(missing[:, None], chosen[~missing].mean(0), chosen)
        features, size = torch.cat([chosen, features], dim=1), chosen.shape[1]
        unlearned = last | missing.numpy()
    space = policy.spec.action_space
    return fill_actions(features, known, rows, rows[unlearned], space, training, out, size)


def fill_actions(
    features: Float[Tensor, "m d"],
    actions: np.ma.MaskedArray,
    rows: Int64[np.ndarray, " m"],
    unlearned: Int64[np.ndarray, " u"],
    space: ActionSpace,
    training: TrainingConfig,
    out: Path,
    latents: int = 0,
) -> np.ndarray:
    """Return the actions of a dataset, where those hidden at `rows` are predicted by a teacher.

    The teacher is a small network on features, trained on the rows with known actions.

    Args:
        features: one vector per entry of `rows`.
        actions: actions of every row of the dataset, masked where hidden.
        rows: rows of the dataset.
        unlearned: rows whose known action the teacher ignores, such as the last row of an episode.
        space: robot action.
        training: training settings of the teacher.
        out: folder of the teacher's training.
        latents: as for `ActionHead`.
    """
    hidden = ~known_rows(actions)[rows]
    known, labeled = np.ma.getdata(actions), torch.from_numpy(~hidden & ~np.isin(rows, unlearned))
    targets = torch.from_numpy(known[rows])
    torch.manual_seed(training.seed)
    teacher = ActionHead(features, targets[labeled], space, latents)
    fit(teacher, LabeledRows(features[labeled], None, targets[labeled]), training.plain, out)
    with torch.inference_mode():
        predicted = teacher.cpu().predict(features)
    if space.discrete:
        predicted = predicted.argmax(1)
    filled = known.copy()
    filled[rows[hidden]] = predicted.numpy()[hidden]
    return filled


class _EndToEnd(nn.Module):
    """Train network and decoder from observations to robot actions."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def loss(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of robot actions."""
        return self.policy.action_loss(batch)
