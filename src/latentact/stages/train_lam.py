"""Learn a latent action model from video: `latentact train-lam data.path=DIR`."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from latentact.config import LARGEST, choice
from latentact.data.cache import FrameStore
from latentact.data.mixture import TrainingDataConfig, open_training_store
from latentact.data.plan import read_plan
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.time_base import frames_in_gap
from latentact.data.windows import Clips
from latentact.device import select_device
from latentact.errors import UserError, require_between
from latentact.evaluation.lam.metrics import LamEvaluation, evaluate_lam
from latentact.io.atomic import atomic_write, write_json
from latentact.labeling.features import with_features
from latentact.lams.contract import LAMS, LatentActionModel
from latentact.training.cluster.contract import CLUSTERS, ClusterStage
from latentact.training.fit import fit
from latentact.training.run_folder import finished, run_folder, saved_steps
from latentact.training.settings import TrainingConfig, require_trainable_size
from latentact.types import ActionSpace, Clip

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainLamConfig(ClusterStage):
    """Learn a latent action model (LAM) from video; only the actions of labeled episodes are used."""

    RENAMED: ClassVar = {"labelled_episodes": "labeled_episodes", "labelled_share": "labeled_share"}

    out: str = "runs/train_lam"
    """Run folder; re-run the same command to resume."""
    data: TrainingDataConfig = field(default_factory=TrainingDataConfig)
    """The video."""
    lam: Any = choice(LAMS, "lapo")
    """Which model."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""
    cluster: Any = choice(CLUSTERS, "local")
    """Where to run it."""
    frame_gap_s: float = 0.0
    """Seconds between the two frames of a transition; 0: neighboring frames."""
    held_out: float = 0.1
    """Fraction of held-out episodes, on which probes are evaluated."""
    split_seed: int = 0
    """Seed of the choice of held-out and labeled episodes."""
    labeled_episodes: int = 0
    """k: training episodes whose actions the model may learn from."""
    plan: str = ""
    """File of `latentact plan` whose first k episodes are labeled; empty: drawn by `split_seed`."""
    labeled_share: float = 0.25
    """Fraction of every batch drawn from the labeled episodes, if there are any."""
    probe_transitions: int = 1024
    """Number of held-out transitions in evaluations during training."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        self.data.require()
        require_between("frame_gap_s", self.frame_gap_s, 0, 86_400)
        require_between("split_seed", self.split_seed, 0, LARGEST)
        require_between("labeled_share", self.labeled_share, 0, 1)
        require_between("probe_transitions", self.probe_transitions, 1, 10**9)


def run(config: TrainLamConfig, out: Path) -> Path:
    """Train, evaluate and save a LAM; return its folder."""
    if finished(out, config, "lam.json"):
        return out
    store = open_training_store(config.data)
    gap = 1
    if config.frame_gap_s:
        gap = frames_in_gap(config.frame_gap_s, store.fps, store.path, setting="frame_gap_s")
    train, held_out = split_episodes(store, held_out=config.held_out, seed=config.split_seed)
    if config.plan and not config.labeled_episodes:
        raise UserError("labeled_episodes must be at least 1 with plan, got 0. Give the number of episodes.")
    labeled = choose_labeled(train, config.labeled_episodes, config.split_seed, read_plan(config.plan, store))

    lam, features = with_features(config.lam, store, select_device(config.training.device))
    torch.manual_seed(config.training.seed)
    model = _model(config, lam, store, gap, len(labeled))
    if model.spec.robot_actions:
        train = labeled
    clips = Clips(
        store,
        episodes=train,
        frame_gap=gap,
        context=model.context,
        horizon=model.horizon,
        labeled=labeled,
        features=features,
    )
    if model.actions is not None:
        rows = clips.rows[np.isin(store.episode[clips.rows], labeled)]
        model.set_action_stats(torch.from_numpy(np.ma.getdata(store.actions(labeled))[rows]))
    # Fails before training if the held-out episodes are too short to evaluate on.
    Clips(store, episodes=held_out, frame_gap=gap, held_out=True)
    log.info(
        "%d transitions of %d episodes, %d of them labeled; %d held out; %d parameters",
        len(clips),
        len(train),
        len(labeled),
        len(held_out),
        sum(parameter.numel() for parameter in model.parameters()),
    )

    evaluated: list[LamEvaluation] = []

    def evaluate(last: bool) -> dict[str, float]:
        device = str(next(model.parameters()).device)
        count = 4096 if last else config.probe_transitions
        evaluated[:] = [
            evaluate_lam(model, store, episodes=held_out, frame_gap=gap, max_transitions=count, device=device)
        ]
        return _scalars(evaluated[0])

    data = _Mixed(clips, labeled, config.labeled_share) if len(labeled) < len(train) else clips
    if not saved_steps(out):
        _or_refuse(lambda: _try(model, data), lam.kind)
    with run_folder(out, config):
        fit(model, data, config.training, out, evaluate, augments=model.augments)
        if not evaluated:  # the run was killed after its last step
            evaluate(True)
        evaluation = evaluated[0]
        for warning in evaluation.numbers["warnings"]:
            log.warning(warning)
        model.cpu().write(out)
        _write_evaluation(out, model, store.digest, evaluation)
    return out


def _write_evaluation(out: Path, model: LatentActionModel, frames: str, evaluation: LamEvaluation) -> None:
    """Write `lam.npz` and then `lam.json`, which ends the run; `frames` is the digest of the data."""
    with atomic_write(out / "lam.npz") as partial:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**evaluation.arrays}
        np.savez_compressed(buffer, **arrays)
        partial.write_bytes(buffer.getvalue())
    values = {"model": model.spec.model, "generative": model.generative, "spec": vars(model.spec)}
    write_json(out / "lam.json", {**values, "frames": frames, **evaluation.numbers})


def _model(config: TrainLamConfig, lam: Any, store: FrameStore, gap: int, labeled: int) -> LatentActionModel:
    """Return the model with random weights, for data with this many labeled training episodes.

    Raises:
        UserError: it cannot be built, or the number of labeled episodes does not fit it.
    """
    model = _or_refuse(lambda: _built(lam, store.action_space, config.training.device), lam.kind)
    model.spec = replace(
        model.spec,
        frame_gap=gap,
        frame_gap_s=gap / store.fps,
        fps=store.fps,
        camera=store.camera,
        resize=config.data.resize,
    )
    if model.actions and not labeled:
        raise UserError(
            f"labeled_episodes must be at least 1 for lam={model.spec.model}, which learns from robot "
            f"actions as configured, got 0. Set labeled_episodes=K."
        )
    if labeled and not model.actions and not model.spec.robot_actions:
        remedy = ", or set lam.action_weight=1" if model.config.with_action_head(1.0) else ""
        raise UserError(
            f"labeled_episodes must be 0 for lam={model.spec.model}, which learns nothing from robot actions "
            f"as configured, got {labeled}. Leave it out{remedy}."
        )
    return model


def _built(lam: Any, actions: ActionSpace | None, device: str) -> LatentActionModel:
    require_trainable_size(lambda: lam.build(actions), f"lam={lam.kind}", device)
    return lam.build(actions)


def _or_refuse[T](work: Callable[[], T], kind: str) -> T:
    """Run the body; convert errors caused by the settings of a model.

    Raises:
        UserError: the settings are invalid.
    """
    try:
        return work()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"lam={kind} cannot be built or trained with these settings: {first}.") from error


def _try(model: LatentActionModel, data: Any) -> None:
    """Compute the loss of two clips with a copy of the model, before anything is written."""
    with torch.no_grad():
        copy.deepcopy(model).train().loss(data.__getitems__([0, len(data) - 1]))


def _scalars(evaluation: LamEvaluation) -> dict[str, float]:
    """Return the scalars of an evaluation for metrics.csv."""
    numbers = evaluation.numbers
    flat = {f"val/{k}": v for k, v in numbers.items() if k.endswith("_mse")}
    flat |= {f"probe/{name}": probe["score"] for name, probe in numbers["probes"].items()}
    return flat | ({"codebook/perplexity": numbers["codebook"]["perplexity"]} if numbers["codebook"] else {})


class _Mixed(Dataset):
    """Clips of all episodes, a fixed share of every batch from the labeled ones."""

    def __init__(self, clips: Clips, labeled: np.ndarray, share: float) -> None:
        self.clips, self.order = clips, clips.order
        self.positions = np.flatnonzero(np.isin(clips.store.episode[clips.rows], labeled))
        self.share = share if len(self.positions) else 0.0

    def __len__(self) -> int:
        return len(self.clips)

    def __getitems__(self, positions: list[int]) -> Clip:
        count = round(self.share * len(positions))
        chosen = [int(self.positions[p % len(self.positions)]) for p in positions[:count]]
        return self.clips.__getitems__([*chosen, *positions[count:]])
