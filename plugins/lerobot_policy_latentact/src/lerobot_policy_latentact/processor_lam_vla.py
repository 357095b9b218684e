"""Processors of `lam_vla`: LeRobot's standard steps; the policy makes the prompt and normalizes by itself."""

from __future__ import annotations

from typing import Any

from lerobot.processor.factory import make_default_pre_post_processors

from lerobot_policy_latentact.configuration_lam_vla import LamVlaConfig


def make_lam_vla_pre_post_processors(
    config: LamVlaConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[Any, Any]:
    """Return the pipelines before and after the policy; normalization is the identity."""
    return make_default_pre_post_processors(config)
