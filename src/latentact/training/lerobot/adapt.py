"""Adapt a LeRobot policy to another dataset: keep its weights, with new projections where sizes differ.

The policy is rebuilt from its changed configuration, so that every new tensor has the policy's own
initialization; then each tensor whose name and shape agree is copied. Nothing depends on the policy type.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentact.agents.lerobot import read_policy_config
from latentact.errors import UserError
from latentact.io.tensors import WEIGHTS, load_tensors

ACTION, STATE = "action", "observation.state"
_DOWNLOADS = {"pretrained_backbone_weights": None, "load_vlm_weights": False}
"""Settings that skip loading weights which the checkpoint replaces anyway."""


def adapt(policy: Path, dataset: Path, out: Path, seed: int) -> dict[str, Any]:
    """Write a LeRobot policy whose features and statistics are those of a dataset.

    Args:
        policy: `pretrained_model` folder of the policy.
        dataset: a LeRobot v3 dataset with robot actions.
        out: existing empty folder; `lerobot-train --policy.path` takes it.
        seed: seed of the new tensors.

    Returns:
        `copied`, the number of copied tensors; `initialized`, the names of those with new weights; `dropped`,
        the names of those that are no longer used; action and state sizes before and after.

    Raises:
        UserError: policy and dataset are incompatible.
    """
    config = read_policy_config(policy)
    if not (policy / WEIGHTS).is_file():
        raise UserError(
            f"{policy} must hold {WEIGHTS}, got none. Give a folder pretrained_model of lerobot-train; merge "
            f"the adapters of PEFT first."
        )
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.policies import make_pre_post_processors

    old = load_tensors(policy / WEIGHTS)
    before = _sizes(config)
    meta: Any = LeRobotDatasetMetadata("local/dataset", root=dataset)
    _set_features(config, meta, policy, dataset)
    after = _sizes(config)
    new = _build(config, meta, seed, policy)
    values = new.state_dict()
    replaced = _shaped_by_actions(config, meta, values, policy) if before[ACTION] == after[ACTION] else set()
    copied = {
        name: old[name]
        for name, value in values.items()
        if name in old and old[name].shape == value.shape and name not in replaced
    }
    new.load_state_dict({**values, **copied})
    shared = {values[name].data_ptr() for name in copied}  # of tied weights a checkpoint has one name
    initialized = [
        name for name, value in values.items() if name not in copied and value.data_ptr() not in shared
    ]
    new.save_pretrained(out)
    for processor in make_pre_post_processors(config, dataset_stats=meta.stats, dataset_meta=meta):
        processor.save_pretrained(out)
    return {
        "copied": len(copied),
        "initialized": initialized,
        "dropped": sorted(old.keys() - values.keys()),
        "action_size": [before[ACTION], after[ACTION]],
        "state_size": [before[STATE], after[STATE]],
    }


def _sizes(config: Any) -> dict[str, int]:
    features = {**(config.input_features or {}), **(config.output_features or {})}
    return {key: int(features[key].shape[0]) if key in features else 0 for key in (ACTION, STATE)}


def _set_features(config: Any, meta: Any, policy: Path, dataset: Path) -> None:
    """Give a configuration the cameras, the state and the actions of a dataset."""
    from lerobot.configs import FeatureType
    from lerobot.utils.feature_utils import dataset_to_policy_features

    features = dataset_to_policy_features(meta.features)
    if ACTION not in features:
        raise UserError(f"{dataset} must have robot actions, got none. Give labeled episodes.")
    inputs = config.input_features or {}
    if STATE in inputs and STATE not in features:
        raise UserError(
            f"{dataset} must have the column {STATE}, which {policy} reads, got none. Give a dataset with "
            "this column."
        )
    cameras = [key for key, feature in inputs.items() if feature.type is FeatureType.VISUAL]
    present = [key for key, feature in features.items() if feature.type is FeatureType.VISUAL]
    if len(cameras) == len(present) == 1:
        cameras = present  # the only one, under any name
    if missing := sorted(set(cameras) - set(present)):
        raise UserError(
            f"{dataset} must have the cameras {', '.join(sorted(cameras))} of {policy}, got "
            f"{', '.join(sorted(present)) or 'none'}. Rename {missing[0]} in one of them."
        )
    config.output_features = {ACTION: features[ACTION]}
    config.input_features = {
        key: feature
        for key, feature in features.items()
        if key in cameras
        or key == STATE
        or (key in inputs and feature.type in (FeatureType.STATE, FeatureType.ENV))
    }
    if hasattr(config, "action_feature_names"):
        names = meta.features[ACTION].get("names")
        config.action_feature_names = list(names) if isinstance(names, list) else None


def _build(config: Any, meta: Any, seed: int, policy: Path) -> Any:
    """Return the policy with random weights."""
    from lerobot.policies import get_policy_class

    kept = {name: getattr(config, name) for name in _DOWNLOADS if hasattr(config, name)}
    try:
        for name in kept:
            setattr(config, name, _DOWNLOADS[name])
        config.validate_features()
        torch.manual_seed(seed)
        return get_policy_class(config.type)(config, dataset_stats=meta.stats, dataset_meta=meta)
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"{policy} cannot be built with the features of the data ({first}). Give data with the cameras "
            f"and the image size that it was trained on."
        ) from error
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _shaped_by_actions(config: Any, meta: Any, values: dict[str, Tensor], policy: Path) -> set[str]:
    """Return the names of the tensors whose shape depends on the number of actions.

    If two datasets have the same number of actions, the shapes of these tensors match, but not their meaning.
    """
    from lerobot.configs import PolicyFeature

    other = deepcopy(config)
    feature = other.output_features[ACTION]
    size = int(feature.shape[0]) + 1
    other.output_features = {ACTION: PolicyFeature(type=feature.type, shape=(size,))}
    found = _build(other, meta, 0, policy).state_dict()
    return {name for name, value in values.items() if found[name].shape != value.shape}
