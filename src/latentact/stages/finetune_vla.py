"""Fine-tune a vision-language-action model to robot actions of few labeled episodes, LAPA's stage 3.

An action head on query tokens is new; the loss of latent actions stays as an auxiliary, on the video of all
training episodes, so that few labels do not overwrite the pretraining. The labeled episodes are
those of `ground` and `compare` with the same `split_seed`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from latentact.config import Between, Seed, check_bounds, choice
from latentact.data.latents import Labels
from latentact.data.plan import read_plan
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.store import FrameStore, known_rows
from latentact.errors import UserError, require_between
from latentact.io.atomic import read_object, write_json
from latentact.policies.vla.heads import ActionHeadConfig
from latentact.policies.vla.model import Vla
from latentact.policies.vla.samples import VlaSamples
from latentact.stages.finetune import fill_actions
from latentact.stages.train_vla import latent_targets, read_frames
from latentact.training.cluster.contract import CLUSTERS, ClusterStage
from latentact.training.fit import fit
from latentact.training.run_folder import finished, run_folder
from latentact.training.settings import TrainingConfig
from latentact.types import ActionSpace

log = logging.getLogger(__name__)
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class FinetuneVlaRecipe:
    """Fine-tuning settings of `finetune-vla` and of rows of `compare`."""

    head: ActionHeadConfig = field(default_factory=ActionHeadConfig)
    """The action head."""
    latent_weight: Annotated[float, Between(0, 1e6)] = 0.1
    """Weight of the loss of latent actions, on all training episodes; robot actions have weight 1."""
    pseudo_labels: bool = False
    """Whether to use all training episodes, with actions decoded from latent actions where they are hidden;
    the decoder is trained on the labeled episodes."""
    decoder_training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, batch_size=64, lr=1e-3, eval_every=0)
    )
    """pseudo_labels: training of the decoder."""
    lora_rank: Annotated[int, Between(0, 4096)] = 0
    """Rank of low-rank adapters on the language model; 0: all its weights are trained."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=2000,
            batch_size=64,
            lr=2e-5,
            weight_decay=0.0,
            warmup_steps=100,
            grad_clip=1.0,
            eval_every=0,
        )
    )
    """How it is trained."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class FinetuneVlaConfig(FinetuneVlaRecipe, ClusterStage):
    """Fine-tune a vision-language-action model to robot actions; run the result with `rollout`."""

    out: str = "runs/finetune_vla"
    """Run folder; re-run the same command to resume."""
    vla: str
    """Folder of the train-vla run."""
    labels: str
    """Folder of the labels that it was trained on; their data must have robot actions."""
    labeled_episodes: int | None = 5
    """k: training episodes whose actions are used; empty: all."""
    plan: str = ""
    """File of `latentact plan` whose first k episodes are labeled; empty: drawn by `split_seed`."""
    scratch: bool = False
    """Whether to start from the vision-language model, without the result of train-vla, and use the labeled
    episodes only (baseline)."""
    cluster: Any = choice(CLUSTERS, "local")
    """Where to run it."""
    held_out: float = 0.1
    """Fraction of held-out episodes; as in train-vla."""
    split_seed: Seed = 0
    """Seed of the choice of held-out and labeled episodes; as in train-vla."""
    eval_rows: Annotated[int, Between(1, 1 << 20)] = 512
    """Number of held-out steps in the evaluation."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        require_between("labeled_episodes", self.labeled_episodes, 1, 10**9)


@dataclass(frozen=True, kw_only=True)
class FinetuneVlaResult:
    """A fine-tuned model and its error on held-out episodes."""

    path: Path
    """Run folder."""
    numbers: dict[str, Any]
    """Content of `finetune_vla.json`."""


def run(config: FinetuneVlaConfig, out: Path) -> FinetuneVlaResult:
    """Fine-tune and save a model."""
    if finished(out, config, "finetune_vla.json"):
        return FinetuneVlaResult(path=out, numbers=read_object(out / "finetune_vla.json"))
    base = Vla.from_pretrained(config.vla)
    labels, store = read_frames(config.labels, base.spec.resolution)
    base.latent.check_compatible(labels.spec, "the model", "the labels")
    space = store.action_space
    if space is None:
        raise UserError(
            f"{store.path} must have robot actions, got none. Give labels of data with robot actions."
        )
    base.spec = replace(base.spec, camera=store.camera)  # of the robot; stage 2 may have used other video
    train, held_out = split_episodes(store, held_out=config.held_out, seed=config.split_seed)
    labeled = choose_labeled(train, config.labeled_episodes, config.split_seed, read_plan(config.plan, store))
    torch.manual_seed(config.training.seed)
    if config.scratch:
        base = Vla.create(base.config, base.spec, base.latent)
    settings = replace(base.config, lora_rank=config.lora_rank)
    model = base.with_actions(settings, space, config.head, config.latent_weight)

    latent, valid = latent_targets(labels, store)
    samples = _samples(store, model, latent, valid, labeled)
    rows, known = samples.rows, samples.known
    assert samples.actions is not None
    assert known is not None
    assert model.own.actions is not None
    labeled_actions = samples.actions[known]
    model.own.actions.set_stats(labeled_actions)
    if config.scratch:  # otherwise the statistics are those of train-vla
        model.set_stats(latent[rows], None if store.state is None else store.state[rows])
    unseen = _samples(store, model, latent, valid, held_out)
    if config.pseudo_labels or (config.latent_weight and not config.scratch):
        # half of a batch are labeled steps, half any steps of the video
        every = np.flatnonzero(valid & np.isin(store.episode, train))
        samples.rows = np.concatenate([np.resize(rows, max(len(rows), len(every))), every])
    log.info("%d labeled steps of %d episodes", len(rows), len(labeled))
    with run_folder(out, config):
        if config.pseudo_labels:
            _decode_actions(samples, labels, store, train, space, config.decoder_training, out / "decoder")
        fit(model, samples, config.training, out)
        model.cpu()
        numbers: dict[str, Any] = {"labeled_steps": len(rows), "labeled_episodes": len(labeled)}
        numbers |= _errors(model, unseen, labeled_actions, config.eval_rows)
        model.write(out)
        write_json(out / "finetune_vla.json", numbers)
    return FinetuneVlaResult(path=out, numbers=numbers)


def _samples(
    store: FrameStore, model: Vla, latent: np.ndarray, valid: np.ndarray, episodes: np.ndarray
) -> VlaSamples:
    """Return the steps of given episodes with their robot actions."""
    actions = store.actions(episodes)
    known = known_rows(actions) & store.usable
    known[store.starts + store.lengths - 1] = False  # the last action has no next frame
    assert model.head is not None
    return VlaSamples(
        store,
        model.prepare_inputs,
        np.flatnonzero(known),
        latent=latent,
        valid=valid,
        actions=np.ma.getdata(actions),
        known=known,
        chunk=model.head.chunk_size,
    )


def _decode_actions(
    samples: VlaSamples,
    labels: Labels,
    store: FrameStore,
    train: np.ndarray,
    space: ActionSpace,
    training: TrainingConfig,
    out: Path,
) -> None:
    """Fill in the hidden actions of the training episodes, decoded from the latent actions of their steps."""
    assert samples.actions is not None
    assert samples.known is not None
    rows = np.flatnonzero(labels.valid & store.usable & np.isin(store.episode, train))
    features = torch.from_numpy(labels.vectors[rows]).flatten(1)
    mask = (
        ~samples.known if samples.actions.ndim == 1 else ~samples.known[:, None] & np.ones(space.size, bool)
    )
    actions = np.ma.array(samples.actions, mask=mask)
    samples.actions = fill_actions(features, actions, rows, rows[:0], space, training, out)
    samples.known = samples.known.copy()
    samples.known[rows] = True


def _errors(model: Vla, samples: VlaSamples, known: np.ndarray, most: int) -> dict[str, Any]:
    """Return held-out accuracy, or L1 by dimension, with that of the majority class or mean action."""
    rows = samples.rows[:: max(1, len(samples.rows) // most)]
    assert samples.actions is not None
    truth = samples.actions[rows]
    parts = []
    for part in (rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)):
        batch = samples.batch(part)
        parts.append(model.actions(batch.inputs, batch.state)[:, 0].numpy(force=True))
    predicted, space = np.concatenate(parts), model.spec.action_space
    assert isinstance(space, ActionSpace)
    if space.discrete:
        usual = np.bincount(known).argmax()
        return {
            "held_out_accuracy": float((predicted == truth).mean()),
            "majority_accuracy": float((usual == truth).mean()),
        }
    return {
        "held_out_l1": np.abs(predicted - truth).mean(0).tolist(),
        "mean_action_l1": np.abs(known.mean(0) - truth).mean(0).tolist(),
    }
