"""Processors of `latentact`: LeRobot's standard steps; the policy converts and normalizes internally."""

from __future__ import annotations

from typing import Any

from lerobot.processor.factory import make_default_pre_post_processors

from lerobot_policy_latentact.configuration_latentact import LatentactConfig


def make_latentact_pre_post_processors(
    config: LatentactConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[Any, Any]:
    """Return the pre- and post-processor pipelines; normalization is the identity."""
    return make_default_pre_post_processors(config)
