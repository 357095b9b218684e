"""Shared by tests of LeRobot policies: small demonstrations, a small LAM, small networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentact.data.lerobot.writer import EpisodeBuffer, RecordSpec, stage_episode, write_dataset
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.vq_ema import VqEmaConfig
from latentact.types import ActionSpace

CAMERA, TOKENS = "observation.images.top", "observation.lam_tokens"
K, D, GAP, STEPS, SIZE = 2, 4, 2, 12, 64
SMALL: dict[str, dict[str, Any]] = {
    "diffusion": {
        **{"down_dims": [8, 16], "n_groups": 2, "horizon": 8, "n_action_steps": 4},
        **{"num_train_timesteps": 4, "spatial_softmax_num_keypoints": 4},
    },
    "act": {
        **{"chunk_size": 8, "n_action_steps": 4, "dim_model": 16, "n_heads": 2, "dim_feedforward": 16},
        **{"n_encoder_layers": 1, "n_vae_encoder_layers": 1},
    },
}
"""Settings of small host policies, with training steps of a fraction of a second."""


def write_demonstrations(folder: Path, episodes: int = 3, seed: int = 0) -> Path:
    """Write a LeRobot dataset of noise at 10 fps, `STEPS` rows an episode."""
    spec = RecordSpec(
        fps=10,
        camera=CAMERA,
        height=SIZE,
        width=SIZE,
        action_space=ActionSpace(kind="continuous", size=2),
        action_names=("x.pos", "y.pos"),
        state_names=("x.pos", "y.pos"),
        robot_type="toy",
    )
    rng, paths = np.random.default_rng(seed), [folder / f"{i}.npz" for i in range(episodes)]
    for path in paths:
        one = EpisodeBuffer(
            frames=rng.integers(0, 256, (STEPS, SIZE, SIZE, 3), np.uint8),
            state=10 * rng.random((STEPS, 2), np.float32),
            action=rng.random((STEPS, 2), np.float32),
            reward=rng.random(STEPS, np.float32),
            success=np.arange(STEPS) == STEPS - 1,
            task="go",
        )
        stage_episode(path, spec, one)
    write_dataset(folder / "plain", spec, paths, sidecars={})
    return folder / "plain"


def write_lam(folder: Path, seed: int = 0) -> Path:
    """Write a LAM with random weights: `K` tokens of `D` numbers, `GAP` frames ahead at 10 fps."""
    torch.manual_seed(seed)
    bottleneck = VqEmaConfig(dim=K * D, codebooks=K, positions=1, codebook_size=8, decay=0.9)
    model = LapoConfig(
        size=32, backbone="patch", idm_channels=(16,), fdm_channels=(16,), patch=8, bottleneck=bottleneck
    ).build()
    assert (model.spec.tokens, model.spec.token_dim) == (K, D)
    model.spec = replace(model.spec, frame_gap=GAP, frame_gap_s=GAP / 10, fps=10.0)
    model.save_pretrained(folder)
    return folder
