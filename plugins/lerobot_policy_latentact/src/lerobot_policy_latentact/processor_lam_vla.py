"""Processors of `lam_vla`: LeRobot's default steps; the policy itself builds prompts and normalizes."""

from __future__ import annotations

from typing import Any

from lerobot.processor.factory import make_default_pre_post_processors

from lerobot_policy_latentact.configuration_lam_vla import LamVlaConfig


def make_lam_vla_pre_post_processors(
    config: LamVlaConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[Any, Any]:
    """Return the pre- and post-processor pipelines; normalization is the identity."""
    return make_default_pre_post_processors(config)
