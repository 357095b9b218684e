"""Predict robot actions, with an uncertainty, for video without actions: `latentact export`.

Example: `latentact export --policy runs/ground --labels data/labels --labeled-episodes 5 --out data/pseudo`.
A head reads the action from the latent action of the step together with the policy's features of the frame;
an inverse dynamics model's labels are actions already. Predictions are calibrated on labeled episodes that
they were not trained on: by cross-fitting among the labeled episodes, or on further ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from latentact.config import LARGEST, Between, OneOf, to_dict
from latentact.data.cache import DataConfig
from latentact.data.convert import Piece, convert_with_actions
from latentact.data.exports import LabeledEpisode, write_lapa_jsonl, write_robomimic, write_zarr
from latentact.data.latents import Labels, read_labels
from latentact.data.lerobot.verify import verify_dataset
from latentact.data.plan import PlanRecord, read_plan
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.store import FrameStore, known_rows
from latentact.data.stream import FrameStream
from latentact.errors import UserError, require_one_of
from latentact.evaluation.policy.conformal import Calibration, ClassCalibration, IntervalCalibration
from latentact.io.atomic import atomic_dir, read_object, write_json
from latentact.io.hub import resolve_folder
from latentact.io.records import read_record
from latentact.io.tensors import WEIGHTS, weights_hash
from latentact.policies.contract import Policy
from latentact.stages.precompute import clear_drafts, require_rows
from latentact.training.action_head import fit_head, policy_features
from latentact.types import ActionSpace

log = logging.getLogger(__name__)

FORMATS = ("lerobot", "robomimic", "zarr", "lapa-jsonl")
SIDECAR = "export.json"
MOST_FOLDS = 5
_REMEDY = "use another --format"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write robot actions for every frame of labeled video, with intervals and a mask of trusted frames."""

    labels: str
    """Labels folder of the frames that get robot actions."""
    out: str
    """Folder to write."""
    policy: str = ""
    """Folder of a latent policy, grounded or not; empty: the labels are an inverse dynamics model's."""
    calibration: str = ""
    """Labels folder of data with robot actions, by the same LAM; empty: `labels`."""
    format: Annotated[str, OneOf(FORMATS)] = "lerobot"
    """lerobot: a LeRobot v3 dataset; robomimic: HDF5; zarr: Diffusion Policy's ReplayBuffer; lapa-jsonl:
    LAPA's lines, and images."""
    labeled_episodes: Annotated[int, Between(2, LARGEST)] = 5
    """k: episodes of `calibration` whose robot actions are used; for an inverse dynamics model, its training
    episodes."""
    plan: str = ""
    """File of `latentact plan` whose first k episodes are labeled; empty: drawn by `split_seed`."""
    calibration_episodes: Annotated[int, Between(0, LARGEST)] = 0
    """Further labeled episodes, for calibration only; 0: cross-fitting among the labeled ones."""
    level: Annotated[float, Between(0.5, 0.999)] = 0.9
    """Probability that an interval or set covers the true action."""
    max_uncertainty: Annotated[float, Between(0, 1000)] = 0.5
    """Maximum uncertainty of a trusted frame: 1 - probability of the class, or half-width of the interval as
    a multiple of the actions' standard deviation."""
    only_trusted: bool = False
    """Whether to leave out other frames; each contiguous run of trusted frames becomes an episode."""
    resolution: Annotated[int, Between(0, 4096)] = 0
    """Height and width of the frames, for formats other than lerobot; 0: the data's own."""
    steps: Annotated[int, Between(1, 10**6)] = 1000
    """Training steps of each head."""
    held_out: Annotated[float, Between(0, 0.999)] = 0.1
    """Fraction of the episodes of `calibration` on which the result is evaluated; as in the other stages."""
    split_seed: Annotated[int, Between(0, LARGEST)] = 0
    """Seed of the choice of held-out and labeled episodes; as in the other stages."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("--format", self.format, FORMATS)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of `export`: the folder and the scores of its actions."""

    path: Path
    """The folder."""
    numbers: dict[str, Any]
    """Content of `export.json`."""

    def to_json(self) -> dict[str, Any]:
        """Return the folder and the scores."""
        return {"path": str(self.path), **self.numbers}


def run(config: ExportConfig) -> Exported:
    """Write the actions and return their scores."""
    out, asked = Path(config.out), to_dict(config)
    if config.plan:
        asked["plan_episodes"] = read_record(PlanRecord, Path(config.plan)).model_dump()["episodes"]
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        done = read_object(out / SIDECAR) if (out / SIDECAR).is_file() else {}
        if done.get("asked") != asked:
            raise UserError(
                f"{out} must be empty or hold this export, got other files or settings. Choose another --out."
            )
        log.info("%s is already finished", out)
        return Exported(path=out, numbers=done)
    labels, store = read_labels(config.labels)
    known, labeled_store = read_labels(config.calibration) if config.calibration else (labels, store)
    labels.spec.check_compatible(known.spec, "the labels", "those of --calibration")
    space = labeled_store.action_space
    if space is None:
        raise UserError(
            f"{labeled_store.path} has no robot actions to learn from. Give --calibration with labels of "
            f"data with robot actions."
        )
    if space.discrete and config.format in ("robomimic", "zarr"):
        raise UserError(
            f"--format {config.format} must have continuous actions, got {space}. Use --format lerobot."
        )
    policy = _policy(config, labels)
    stream = _stream(config, labels)
    train, held_out = split_episodes(labeled_store, held_out=config.held_out, seed=config.split_seed)
    k, planned = config.labeled_episodes, read_plan(config.plan, labeled_store)
    labeled = choose_labeled(train, k, config.split_seed, planned)
    more = choose_labeled(train, k + config.calibration_episodes, config.split_seed, planned)
    extra = np.setdiff1d(more, labeled)
    inputs = _inputs(policy, known, labeled_store)
    predictor = _Predictor.fit(
        config, policy is not None, inputs, known, labeled_store, labeled, extra, train
    )
    evaluation = predictor.evaluate(inputs, known, labeled_store, held_out)
    found = predictor.columns(inputs if labels is known else _inputs(policy, labels, store), labels.valid)
    trusted = labels.valid & (found["uncertainty"] <= config.max_uncertainty)
    kept = trusted if config.only_trusted else labels.valid
    if not kept.any():
        raise UserError(
            f"no frame of {config.labels} is trusted at --max-uncertainty {config.max_uncertainty:g}. Give a "
            f"larger one, or label more episodes."
        )
    numbers = {
        "asked": asked,
        "dataset": stream.path.resolve().name,
        "spec": asdict(labels.spec),
        "digest": store.digest,
        "policy_weights": weights_hash(resolve_folder(config.policy) / WEIGHTS) if config.policy else None,
        "actions": str(space),
        "labeled_steps": predictor.labeled_steps,
        "calibration_steps": predictor.calibration_steps,
        "held_out": evaluation,
        "frames": int(labels.valid.sum()),
        "trusted_frames": int(trusted.sum()),
        "software": {"latentact": version("latentact")},
    }
    clear_drafts(out)
    with atomic_dir(out) as folder:
        _write(config, folder, stream, store, labels, found, trusted, kept, space, labeled_store, numbers)
        write_json(folder / SIDECAR, numbers)
    return Exported(path=out, numbers=numbers)


def _policy(config: ExportConfig, labels: Labels) -> Policy | None:
    """Return the latent policy; None for labels that are robot actions."""
    if labels.spec.robot_actions:
        if config.policy:
            raise UserError(
                f"{config.labels} holds robot actions of {labels.spec.model}, which need no policy. Leave "
                f"out --policy."
            )
        if not config.calibration_episodes:
            raise UserError(
                "--calibration-episodes must be at least 1 for labels of an inverse dynamics model, which "
                "was trained on the labeled episodes, got 0. Give labeled episodes that it was not trained "
                "on."
            )
        return None
    if not config.policy:
        raise UserError(
            f"{config.labels} holds latent actions of {labels.spec.model}; --policy must be a latent policy, "
            f"got none. Give the folder of train-policy or ground."
        )
    policy = Policy.from_pretrained(config.policy)
    if policy.latent is None or not policy.targets.latent:
        raise UserError(
            f"{config.policy} must be a latent policy, got one of robot actions. Give one of policy=latent."
        )
    policy.latent.check_compatible(labels.spec, "the policy", "the labels")
    return policy


def _stream(config: ExportConfig, labels: Labels) -> FrameStream:
    """Open the data at the resolution of the output."""
    values: dict[str, Any] = {**to_dict(labels.data), "resolution": config.resolution, "resize": "uint8"}
    stream = FrameStream(DataConfig(**values))
    if config.format == "lerobot":
        require_rows(stream, _REMEDY)
    return stream


def _inputs(policy: Policy | None, labels: Labels, store: FrameStore) -> Tensor:
    """Return the inputs of action prediction, ``[n, f]``; the latent action comes first."""
    if policy is None:
        return torch.from_numpy(labels.vectors.reshape(len(labels.vectors), -1))
    column = getattr(labels, policy.targets.column)
    latents = policy.normal_latent(torch.from_numpy(column).flatten(1))
    parts = [latents, policy_features(policy, store, np.arange(store.num_frames))]
    if policy.uses_state:
        state = None if store.state is None else torch.from_numpy(store.state)
        parts.append(policy.normal_state(state))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, kw_only=True)
class _Predictor:
    """Predict actions and their uncertainties."""

    space: ActionSpace
    heads: list[Any]
    """Action heads; empty: the inputs are actions."""
    calibration: Calibration
    labeled_steps: int
    calibration_steps: int

    @classmethod
    def fit(
        cls,
        config: ExportConfig,
        learns: bool,
        inputs: Tensor,
        labels: Labels,
        store: FrameStore,
        labeled: np.ndarray,
        extra: np.ndarray,
        unlabeled: np.ndarray,
    ) -> _Predictor:
        """Train on the labeled episodes, and calibrate on steps that a head was not trained on.

        Args:
            config: settings.
            learns: whether heads are trained; else the inputs are actions.
            inputs: inputs of every row of the store.
            labels: labels of the store.
            store: the data.
            labeled: training episodes.
            extra: further labeled episodes for calibration; empty: cross-fitting.
            unlabeled: episodes whose frames may be used for self-training.
        """
        space = store.action_space
        assert space is not None
        rows, actions = _labeled_rows(labels, store, labeled)
        number = np.unique(store.episode[rows], return_inverse=True)[1]
        folds = number % MOST_FOLDS
        if learns and not folds.any():
            raise UserError(
                "at least 2 labeled episodes must have latent actions, got 1. Label more episodes."
            )
        targets = torch.from_numpy(actions)
        others = np.setdiff1d(unlabeled, [*labeled, *extra])
        heads = [
            fit_head(
                inputs[rows[folds != fold]],
                targets[folds != fold],
                space,
                config.steps,
                seed=fold,
                unlabeled=inputs[np.flatnonzero(labels.valid & np.isin(store.episode, others))],
            )
            for fold in (range(folds.max() + 1) if learns else ())
        ]
        if len(extra):
            known, truth = _labeled_rows(labels, store, extra)
            predicted = _mean(heads, inputs[known])
        else:
            known, truth = rows, actions
            predicted = _mean(heads[:1], inputs[rows])
            for fold, head in enumerate(heads):
                predicted[folds == fold] = _mean([head], inputs[rows[folds == fold]])
        log.info("%d labeled steps, %d to calibrate on", len(rows), len(known))
        if space.discrete:
            calibration = ClassCalibration.fit(predicted.double().numpy(), truth, config.level)
        else:
            residuals = np.abs(predicted.numpy() - truth)
            groups = store.episode[known]
            spread = np.maximum(actions.std(0), 1e-9)
            calibration = IntervalCalibration.fit(
                inputs[known].numpy(), residuals, groups, config.level, spread
            )
        return cls(
            space=space,
            heads=heads,
            calibration=calibration,
            labeled_steps=len(rows),
            calibration_steps=len(known),
        )

    def columns(self, inputs: Tensor, valid: np.ndarray) -> dict[str, np.ndarray]:
        """Return action, interval or set, and uncertainty of every row (infinite where not valid)."""
        predicted = _mean(self.heads, inputs[valid])
        found = self.calibration.columns(predicted, inputs[valid])
        columns = {}
        for name, values in found.items():
            columns[name] = np.zeros((len(valid), *values.shape[1:]), values.dtype)
            columns[name][valid] = values
        columns["uncertainty"] = np.where(valid, columns["uncertainty"], np.inf).astype(np.float32)
        return columns

    def evaluate(
        self, inputs: Tensor, labels: Labels, store: FrameStore, episodes: np.ndarray
    ) -> dict[str, Any] | None:
        """Return scores on held-out episodes; None without steps."""
        rows, truth = _labeled_rows(labels, store, episodes)
        if not len(rows):
            return None
        found = self.columns(inputs[rows], np.ones(len(rows), bool))
        if self.space.discrete:
            covered = found["set"][np.arange(len(rows)), truth]
            return {
                "steps": len(rows),
                "accuracy": float((found["action"] == truth).mean()),
                "coverage": float(covered.mean()),
                "set_size": float(found["set"].sum(1).mean()),
            }
        inside = (found["low"] <= truth) & (truth <= found["high"])
        error, total = np.square(found["action"] - truth).sum(), np.square(truth - truth.mean(0)).sum()
        return {
            "steps": len(rows),
            "r2": float(1 - error / total) if total else None,
            "coverage": float(inside.mean()),
            "half_width": (found["high"] - found["action"]).mean(0).tolist(),
        }


def _mean(heads: list[Any], inputs: Tensor) -> Tensor:
    """Return the mean prediction of the heads; without heads, the inputs."""
    if not heads:
        return inputs
    with torch.no_grad():
        return torch.stack([head.predict(inputs) for head in heads]).mean(0)


def _labeled_rows(labels: Labels, store: FrameStore, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of given episodes with a latent and a robot action, and the robot actions."""
    actions = store.actions(episodes)
    rows = np.flatnonzero(known_rows(actions) & labels.valid)
    if not len(rows) and len(episodes):
        raise UserError("the labeled episodes must have latent actions, got none. Label more episodes.")
    return rows, np.ma.getdata(actions)[rows]


def _write(
    config: ExportConfig,
    folder: Path,
    stream: FrameStream,
    store: FrameStore,
    labels: Labels,
    found: dict[str, np.ndarray],
    trusted: np.ndarray,
    kept: np.ndarray,
    space: ActionSpace,
    named: FrameStore,
    about: dict[str, Any],
) -> None:
    """Write the kept rows in the format."""
    action = found.pop("action")
    if space.discrete:
        action = (np.array(space.values)[action] if space.values else action)[:, None]
    columns = {**found, "trusted": trusted}
    spans = list(_spans(store, kept))
    if config.format == "lerobot":
        _write_lerobot(folder, stream, store, action, columns, spans, space, named)
        return
    if labels.codes is not None and not labels.spec.robot_actions:
        found = {**found, "codes": labels.codes}
    episodes = _episodes(stream, store, action, found, trusted, spans)
    writers = {"robomimic": write_robomimic, "zarr": write_zarr, "lapa-jsonl": write_lapa_jsonl}
    writers[config.format](folder, episodes, about)


def _spans(store: FrameStore, kept: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (episode, first row, last row + 1) of each run of kept rows; the next row ends the episode."""
    for episode, (start, length) in enumerate(zip(store.starts, store.lengths, strict=True)):
        rows = start + np.flatnonzero(kept[start : start + length - 1])
        breaks = (np.diff(rows) != 1) | (np.diff(store.source_rows[rows]) != 1)
        for run in np.split(rows, np.flatnonzero(breaks) + 1):
            if len(run):
                yield episode, int(run[0]), int(run[-1]) + 1


def _write_lerobot(
    folder: Path,
    stream: FrameStream,
    store: FrameStore,
    action: np.ndarray,
    columns: dict[str, np.ndarray],
    spans: list[tuple[int, int, int]],
    space: ActionSpace,
    named: FrameStore,
) -> None:
    """Write a LeRobot dataset; as `collect` does, episodes end with an action not executed."""
    numbers = {episode.name: number for number, episode in enumerate(stream.source.episodes)}
    pieces = []
    for episode, begin, end in spans:
        rows = np.append(np.arange(begin, end), end - 1)
        extra = {f"pseudo.{name}": values[rows].reshape(len(rows), -1) for name, values in columns.items()}
        extra["pseudo.trusted"][-1] = False
        number = numbers[store.episode_ids[episode]]
        first = int(store.source_rows[begin] - stream.source.first_rows[number])
        pieces.append(Piece(number=number, first=first, columns={"action": action[rows], **extra}))
    names: Any = list(named.action_names) or None
    if space.discrete:
        names = {"classes": names or [str(number) for number in range(space.size)]}
    written = folder / ".written"
    convert_with_actions(stream, written, pieces, names={"action": names}, remedy=_REMEDY)
    for part in written.iterdir():
        part.rename(folder / part.name)
    written.rmdir()
    verify_dataset(folder, _REMEDY)


def _episodes(
    stream: FrameStream,
    store: FrameStore,
    action: np.ndarray,
    extra: dict[str, np.ndarray],
    trusted: np.ndarray,
    spans: list[tuple[int, int, int]],
) -> Iterator[LabeledEpisode]:
    """Yield the episodes with their frames, decoded one episode at a time."""
    numbers = {episode.name: number for number, episode in enumerate(stream.source.episodes)}
    needed: dict[int, list[tuple[int, int, int]]] = {}
    for span in spans:
        needed.setdefault(numbers[store.episode_ids[span[0]]], []).append(span)
    for number, chunks in stream.episodes(sorted(needed)):
        frames = np.concatenate([chunk.frames for chunk in chunks])
        for episode, begin, end in needed[number]:
            inside = slice(begin - store.starts[episode], end + 1 - store.starts[episode])
            task = store.task_texts[store.task[begin]]
            yield LabeledEpisode(
                name=store.episode_ids[episode],
                task=task,
                frames=frames[inside],
                state=None if store.state is None else store.state[begin : end + 1],
                action=action[begin:end],
                trusted=trusted[begin:end],
                extra={name: values[begin:end] for name, values in extra.items()},
            )
