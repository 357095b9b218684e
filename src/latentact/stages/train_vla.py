"""Train a vision-language-action model on latent labels, LAPA's stage 2: `latentact train-vla labels=DIR`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from latentact.config import Between, Pixels, Seed, check_bounds, choice
from latentact.data.cache import open_store
from latentact.data.latents import Labels, read_labels
from latentact.data.splits import split_episodes
from latentact.data.store import FrameStore
from latentact.errors import UserError
from latentact.evaluation.policy.latent_accuracy import evaluate_latents, table
from latentact.io.atomic import read_object, write_json
from latentact.policies.vla.model import Vla, VlaConfig, VlaSpec
from latentact.policies.vla.plan import LAPA, Plan, plan
from latentact.policies.vla.samples import VlaSamples
from latentact.training.cluster.contract import CLUSTERS, ClusterStage
from latentact.training.fit import fit
from latentact.training.run_folder import finished, run_folder
from latentact.training.settings import TrainingConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainVlaRecipe:
    """Training settings of `train-vla` and of rows of `compare`."""

    resolution: Pixels = 0
    """Height and width of the images for the model; 0: as labeled."""
    model: VlaConfig = field(default_factory=VlaConfig)
    """The model."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=20_000, batch_size=256, lr=2e-5, weight_decay=0.0, warmup_steps=500, grad_clip=1.0
        )
    )
    """How it is trained."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class TrainVlaConfig(TrainVlaRecipe, ClusterStage):
    """Train a vision-language-action model to predict latent actions from an image and the task text."""

    out: str = "runs/train_vla"
    """Run folder; re-run the same command to resume."""
    labels: str = ""
    """Folder that `latentact label` wrote; its data is used."""
    cluster: Any = choice(CLUSTERS, "local")
    """Where to run it."""
    held_out: float = 0.1
    """Fraction of held-out episodes."""
    split_seed: Seed = 0
    """Seed of the choice of held-out episodes."""
    eval_rows: Annotated[int, Between(1, 1 << 20)] = 512
    """Number of held-out steps in an evaluation."""
    dry_run: bool = False
    """Print parameters, memory, tokens, FLOPs and hours, and train nothing; --dry-run is the same."""
    tflops: Annotated[float, Between(1e-3, 1e6)] = 150.0
    """dry_run: sustained TFLOP/s of each device; an H200 reaches 136 to 195 with the models of vla_2b."""

    @property
    def only_plans(self) -> bool:
        """Whether only the plan is returned."""
        return self.dry_run


@dataclass(frozen=True, kw_only=True)
class TrainVlaResult:
    """A trained model and its scores."""

    path: Path
    """Run folder."""
    numbers: dict[str, Any]
    """Content of `vla.json`."""

    def __str__(self) -> str:
        """Return verdict, scores and folder for the terminal."""
        scores = table(self.numbers) if "score" in self.numbers else ""
        return "\n".join(filter(None, [self.numbers.get("verdict", ""), scores, str(self.path)]))


def run(config: TrainVlaConfig, out: Path) -> TrainVlaResult | Plan:
    """Train and save a model; with `dry_run`, only return the plan."""
    if config.dry_run:
        return _plan(config)
    if not config.labels:
        raise UserError("labels must be a folder that `latentact label` wrote, got none. Give labels=DIR.")
    if finished(out, config, "vla.json"):
        return _result(out)
    labels, store = read_frames(config.labels, config.resolution)
    train, held_out = split_episodes(store, held_out=config.held_out, seed=config.split_seed)
    torch.manual_seed(config.training.seed)
    model = Vla.create(config.model, vla_spec(store, config.model.use_state), labels.spec)
    latent, exists = latent_targets(labels, store)
    rows = {
        name: np.flatnonzero(exists & np.isin(store.episode, episodes))
        for name, episodes in (("train", train), ("held_out", held_out))
    }
    samples = VlaSamples(store, model.prepare_inputs, rows["train"], latent=latent, valid=exists)
    model.set_stats(latent[rows["train"]], None if store.state is None else store.state[rows["train"]])
    samples.batch(
        rows["train"][:1], tasks=[max(store.task_texts, key=len)]
    )  # raises for a prompt that is too long
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    log.info(
        "%d steps of %d episodes; %s of %s parameters are trained",
        len(samples),
        len(train),
        f"{trained:,}",
        f"{total:,}",
    )
    unseen = rows["held_out"][:: max(1, len(rows["held_out"]) // config.eval_rows)]
    numbers: dict[str, Any] = {}

    def evaluate(last: bool) -> dict[str, float]:
        if not len(unseen):
            return {}
        found = evaluate_latents(model, samples, unseen, rows["train"], complete=last)
        if last:
            numbers.update(found)
        return scalars(found)

    with run_folder(out, config):
        fit(model, samples, config.training, out, evaluate)
        model.cpu()
        if not numbers:  # all steps were already done
            evaluate(True)
        model.write(out)
        write_json(out / "vla.json", {"samples": len(samples), "episodes": len(train), **numbers})
    return _result(out)


def read_frames(labels: str, resolution: int) -> tuple[Labels, FrameStore]:
    """Return labels and their data, with images of `resolution` pixels; 0: as labeled.

    Raises:
        UserError: the labels cannot be read, or frames are not images.
    """
    read, store = read_labels(labels)
    if resolution and resolution != store.frames.shape[1]:
        store = open_store(replace(read.data, resolution=resolution))
    if store.frames.shape[3] != 3:
        raise UserError(
            f"{store.path} must have images of 3 channels for a vision-language model, got "
            f"{store.frames.shape[3]}. Use train-policy."
        )
    return read, store


def vla_spec(store: FrameStore, use_state: bool) -> VlaSpec:
    """Return the inputs and outputs of a model for this data.

    Raises:
        UserError: the model uses the state, and the data has none.
    """
    if use_state and store.state is None:
        raise UserError(f"{store.path} must have observation.state, got none. Set model.use_state=false.")
    return VlaSpec(
        resolution=store.frames.shape[1],
        state_size=0 if store.state is None else store.state.shape[1],
        fps=store.fps,
        camera=store.camera,
    )


def latent_targets(labels: Labels, store: FrameStore) -> tuple[np.ndarray, np.ndarray]:
    """Return the target of each row, codes or else continuous latent actions, and a mask of valid rows."""
    latent = labels.continuous if labels.codes is None else labels.codes
    return latent, labels.valid & store.usable


def scalars(numbers: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of an evaluation for `metrics.csv`."""
    row = {f"val/{numbers['metric']}": numbers["score"]}
    row |= {f"val/{name}": numbers[name] for name in ("exact", "nats") if name in numbers}
    for group in ("baselines", "controls"):
        row |= {f"val/{numbers['metric']}_{name}": value for name, value in numbers.get(group, {}).items()}
    return row


def _result(out: Path) -> TrainVlaResult:
    return TrainVlaResult(path=out, numbers=read_object(out / "vla.json"))


def _plan(config: TrainVlaConfig) -> Plan:
    """Return the plan of a training; without labels, for latent actions like LAPA's."""
    latent, resolution, task = LAPA, config.resolution or 224, ""
    if config.labels:
        labels, store = read_frames(config.labels, config.resolution)
        latent, resolution, task = labels.spec, store.frames.shape[1], max(store.task_texts, key=len)
    t = config.training
    return plan(
        config.model,
        latent,
        resolution=resolution,
        task=task,
        batch_size=t.batch_size,
        steps=t.steps,
        devices=t.devices * t.num_nodes,
        accumulate=t.accumulate,
        sharded=t.strategy == "fsdp",
        bf16=t.precision in ("auto", "bf16-mixed"),
        tflops=config.tflops,
    )
