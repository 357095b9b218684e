"""Which episodes to label: `latentact plan --lam DIR --data DIR --budget K`.

Robot actions are the expensive part of grounding, and episodes differ in how much they teach. The plan lists
episodes in the order in which to label them, for `plan=FILE` of the stages that learn from k labeled ones,
and predicts the success of the grounded policy by k.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from latentact.config import Count, OneOf, Seed, check_bounds, from_dict, to_dict
from latentact.data.cache import DataConfig
from latentact.data.latents import MANIFEST, Labels, Manifest, read_labels
from latentact.data.locate import absolute_name
from latentact.data.plan import plan_entry, read_plan
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.store import FrameStore
from latentact.errors import UserError, require_between, require_one_of
from latentact.evaluation.lam.selection import (
    METHODS,
    Candidates,
    Coverage,
    means_of,
    random_equivalent,
    standardized,
)
from latentact.evaluation.policy.learning_curve import LearningCurve, Measured
from latentact.io.atomic import read_object, write_json
from latentact.io.hub import resolve_folder
from latentact.io.records import Record, read_record, read_yaml
from latentact.io.tensors import WEIGHTS, weights_hash
from latentact.policies.contract import Policy
from latentact.stages import label
from latentact.stages.ground import GroundConfig
from latentact.training.action_head import policy_features

log = logging.getLogger(__name__)

SURE = 0.01
"""Importance of a step where the decoder is certain."""
CONDITIONS = ("view", "distract", "latency", "action_noise", "max_steps")
"""Settings of a rollout besides its environment that must be equal."""
MOST_RANDOM = 256
"""Most random episodes that a plan is compared with."""


class MeasuredRollout(Record):
    """What a plan reads of `rollout.json`."""

    env: str
    episodes: int
    success: float | None
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Choose the episodes whose labels help most, and predict success by their number."""

    lam: str = ""
    """Folder or hub id of the latent action model."""
    data: str = ""
    """Data whose episodes are to be labeled; they need no robot actions."""
    labels: str = ""
    """Folder of `latentact label`, instead of LAM and data."""
    budget: Count
    """K: episodes to label."""
    method: Annotated[str, OneOf(METHODS)] = "coverage"
    """coverage: those that together represent all episodes best; random: those of `split_seed`, as without a
    plan; longest; kmeans: one of each cluster of episodes."""
    labeled: str = ""
    """Plan whose episodes are labeled already: they stay first, and `budget` further ones follow."""
    policy: str = ""
    """Latent policy, by whose features episodes are compared instead of by their latent actions; grounded on
    discrete actions: episodes count by the uncertainty of its decoder."""
    results: tuple[str, ...] = ()
    """Folder of `compare` or of rollouts of grounded policies, from which success is predicted; may be given
    several times."""
    camera: str = ""
    """Camera key of the data; empty: the only one."""
    held_out: float = 0.1
    """Fraction of held-out episodes, which are never chosen; as in the other stages."""
    split_seed: Seed = 0
    """Seed of the choice of held-out episodes; as in the other stages."""
    out: str = "plan.json"
    """File to write."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("--method", self.method, METHODS)
        check_bounds(self, "--")
        require_between("--held-out", self.held_out, 0, 0.999)
        if bool(self.labels) == bool(self.lam or self.data) or bool(self.lam) != bool(self.data):
            raise UserError(
                f"--labels, or --lam and --data, must be given, got --labels {self.labels!r}, --lam "
                f"{self.lam!r} and --data {self.data!r}. Give --labels DIR, or both --lam and --data."
            )


@dataclass(frozen=True, kw_only=True)
class WrittenPlan:
    """A written plan."""

    path: Path
    """The file."""
    content: dict[str, Any]
    """What is in it."""

    def to_json(self) -> dict[str, Any]:
        """Return the file and its content."""
        return {"path": str(self.path), **self.content}


def run(config: PlanConfig) -> WrittenPlan:
    """Write the plan.

    Raises:
        UserError: LAM, data, labels, policy or rollouts cannot be read or do not match, or there are fewer
            episodes than the budget.
    """
    out = Path(config.out)
    asked = {name: value for name, value in to_dict(config).items() if name != "out"}
    _check_output(out, asked)
    with tempfile.TemporaryDirectory(prefix="latentact_plan_") as folder:
        labels, store = read_labels(config.labels or _encode(config, Path(folder) / "labels"))
    train, _ = split_episodes(store, held_out=config.held_out, seed=config.split_seed)
    planned = read_plan(config.labeled, store)
    labeled = np.zeros(0, np.int64) if planned is None else planned
    choose_labeled(train, None, config.split_seed, labeled)  # none of them is held out
    given = _candidates(config, labels, store, train, labeled)
    if config.budget > len(given.left):
        raise UserError(
            f"--budget must be at most {len(given.left)}, the number of training episodes without labels, "
            f"got {config.budget}. Use a smaller --budget."
        )
    chosen = np.concatenate([labeled, METHODS[config.method](given, config.budget)])
    useful = train[given.steps[train] > 0]
    curve = given.coverage.random_curve(useful, min(len(useful), MOST_RANDOM))
    measured = _measured(config.results, given.coverage, curve, store)
    content = {
        "method": config.method,
        "labeled": len(labeled),
        "episodes": _described(chosen, given, curve, LearningCurve.fit(measured), store),
        "rollouts": len(measured),
        "asked": asked,
        "data": absolute_name(labels.data.path),
        "digest": store.digest,
        "spec": asdict(labels.spec),
        "policy_weights": weights_hash(resolve_folder(config.policy) / WEIGHTS) if config.policy else None,
        "software": {"latentact": version("latentact")},
    }
    write_json(out, content)
    return WrittenPlan(path=out, content=content)


def _check_output(out: Path, asked: dict[str, Any]) -> None:
    """Raise a UserError unless the file is new, or a plan with these settings."""
    if not out.exists():
        return
    if out.is_dir() or read_object(out).get("asked") != asked:
        raise UserError(
            f"{out} must be new or a plan with these settings, got "
            f"{'a folder' if out.is_dir() else 'another file'}. Choose another --out, or delete it."
        )


def _encode(config: PlanConfig, out: Path) -> Path:
    """Label the data with the LAM; latent actions come from the cache, where there are some."""
    data = DataConfig(path=config.data, camera=config.camera)
    return label.run(label.LabelConfig(lam=config.lam, data=data, out=str(out)))


def _candidates(
    config: PlanConfig, labels: Labels, store: FrameStore, train: np.ndarray, labeled: np.ndarray
) -> Candidates:
    """Return the episodes as points: by their latent actions, or by the features of the policy."""
    rows = np.flatnonzero(labels.valid)
    episode, uncertainty = store.episode[rows], None
    if config.policy:
        policy = _load_policy(config.policy, labels)
        values = policy_features(policy, store, rows).numpy()
        if policy.decoder is not None and policy.decoder.space.discrete:
            unsure = SURE + _uncertainty(policy, labels, store, rows)[:, None]
            uncertainty = means_of(unsure, episode, store.num_episodes)[:, 0]
    else:
        values = standardized(labels.vectors[rows].reshape(len(rows), -1))
    points, steps = (
        means_of(values, episode, store.num_episodes),
        np.bincount(episode, minlength=store.num_episodes),
    )
    return Candidates(
        coverage=Coverage.fit(points, train[steps[train] > 0], uncertainty),
        points=points,
        steps=steps,
        train=train,
        labeled=labeled,
        seed=config.split_seed,
    )


def _load_policy(folder: str, labels: Labels) -> Policy:
    """Load a latent policy.

    Raises:
        UserError: it is none, or it learned from other latent actions.
    """
    policy = Policy.from_pretrained(folder)
    if policy.latent is None or not policy.targets.latent:
        raise UserError(
            f"--policy must be a policy of latent actions, got one of robot actions in {folder}. Give the "
            "folder of train-policy or ground."
        )
    policy.latent.check_compatible(labels.spec, "the policy", "the labels")
    return policy


@torch.inference_mode()
def _uncertainty(policy: Policy, labels: Labels, store: FrameStore, rows: np.ndarray) -> np.ndarray:
    """Return 1 - the probability of the decoder's action, of each row."""
    assert policy.decoder is not None
    column = getattr(labels, policy.targets.column)
    latents = policy.normal_latent(torch.from_numpy(column[rows]).flatten(1))
    state = None
    if policy.decoder.config.use_state and store.state is not None:
        state = policy.normal_state(torch.from_numpy(store.state[rows]))
    likely = policy.decoder(latents[:, None], state).softmax(-1).amax(-1)
    return 1 - likely.mean(1).numpy()


def _measured(
    folders: tuple[str, ...], coverage: Coverage, curve: np.ndarray, store: FrameStore
) -> list[Measured]:
    """Return the success of the grounded policies whose rollouts are in these folders.

    Raises:
        UserError: a folder holds none, or they are in several environments.
    """
    found: list[Measured] = []
    conditions: set[tuple[str, ...]] = set()
    seen: set[Path] = set()
    for folder in folders:
        before = len(found)
        for file in sorted(Path(folder).rglob("rollout.json")):
            rollout = read_record(MeasuredRollout, file)
            grounding = _grounding(Path(rollout.config.get("policy", "")))
            if grounding is None or rollout.success is None or file.resolve() in seen:
                continue
            seen.add(file.resolve())
            conditions.add((rollout.env, *(f"{rollout.config.get(name)}" for name in CONDITIONS)))
            k = _worth(grounding, coverage, curve, store)
            successes = rollout.success * rollout.episodes
            found.append(Measured(k=k, successes=successes, episodes=rollout.episodes))
        if len(found) == before:
            raise UserError(
                f"--results must hold rollouts of grounded policies with success, got none in {folder}. "
                "Give a folder of latentact compare, or of rollouts of policies that are still in place."
            )
    if len(conditions) > 1:
        got = " and ".join(", ".join(filter(None, each)) for each in sorted(conditions)[:2])
        raise UserError(
            f"--results must hold rollouts in one environment with the same {', '.join(CONDITIONS)}, got "
            f"{got}. Give the folders of one of them."
        )
    return found


def _grounding(policy: Path) -> GroundConfig | None:
    """Return the settings by which a policy was grounded; None if it was not, or is fine-tuned afterwards."""
    tuned = policy.name == "finetuned"
    folder = policy.parent if tuned else policy
    if not (folder / "ground.json").is_file() or (not tuned and (folder / "finetuned").is_dir()):
        return None
    grounding = from_dict(GroundConfig, {**read_yaml(folder / "config.yaml"), "out": str(folder)})
    return grounding if grounding.mode == "offline" else None  # online: learned from reward, not from labels


def _worth(grounding: GroundConfig, coverage: Coverage, curve: np.ndarray, store: FrameStore) -> float:
    """Return how many random episodes the labels of a policy are worth; on other data, their number."""
    manifest = Path(grounding.labels) / MANIFEST
    if not manifest.is_file() or read_record(Manifest, manifest).digest != store.digest:
        return grounding.labeled_episodes
    train, _ = split_episodes(store, held_out=grounding.held_out, seed=grounding.split_seed)
    planned = read_plan(grounding.plan, store)
    chosen = choose_labeled(train, grounding.labeled_episodes, grounding.split_seed, planned)
    return random_equivalent(coverage.of(chosen), curve)


def _described(
    chosen: np.ndarray, given: Candidates, curve: np.ndarray, success: LearningCurve, store: FrameStore
) -> list[dict[str, Any]]:
    """Return the episodes in order, each with the coverage and predicted success of those up to it."""
    described = []
    for k, episode in enumerate(chosen.tolist(), 1):
        covered = given.coverage.of(chosen[:k])
        worth = random_equivalent(covered, curve)
        predicted = success.predict(worth)
        described.append(
            {
                **plan_entry(store, episode),
                "steps": int(given.steps[episode]),
                "coverage": max(covered, 0.0),
                "random_equivalent": worth,
                "success": predicted.success,
                "ci95": [predicted.low, predicted.high],
            }
        )
    return described


def summary(content: dict[str, Any]) -> str:
    """Return a plan as a table."""
    lines = [f"{'k':>3s}  {'episode':24s} {'steps':>5s}  coverage  as random  predicted success"]
    for k, each in enumerate(content["episodes"], 1):
        low, high = each["ci95"]
        lines.append(
            f"{k:3d}  {each['name']:24s} {each['steps']:5d}  {each['coverage']:8.2f}  "
            f"{each['random_equivalent']:9.1f}  {each['success']:.2f} ({low:.2f} to {high:.2f})"
        )
    if not content["rollouts"]:
        lines.append(
            "No rollouts are known, so predicted success is a guess; --results DIR predicts it from rollouts."
        )
    return "\n".join(lines)
