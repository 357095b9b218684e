"""Show what augmentation does to clips: `latentact preview-augment --data DIR --shift 4`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import UInt8

from latentact.config import Between, Seed, check_bounds
from latentact.data.cache import DataConfig, open_store
from latentact.data.transforms import AugmentConfig, augment_frames
from latentact.data.windows import Clips
from latentact.errors import UserError
from latentact.reporting.pages.augment import Preview, write_page


@dataclass(frozen=True, kw_only=True)
class PreviewAugmentConfig:
    """Show clips of a dataset before and after augmentation."""

    data: DataConfig
    """The data."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """The augmentation, as `training.augment` of training commands."""
    out: str = "preview_augment.html"
    """File for the page."""
    clips: Annotated[int, Between(1, 64)] = 4
    """Clips of three frames, spread over the data."""
    draws: Annotated[int, Between(1, 16)] = 3
    """Draws per clip."""
    seed: Seed = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)
        if not self.augment.frames:
            raise UserError(
                f"the augmentation must change the frames, got {self.augment}. Give, for example, --shift 4 "
                f"--brightness 0.2."
            )


def run(config: PreviewAugmentConfig) -> Path:
    """Write the page and return its path."""
    store = open_store(config.data)
    windows = Clips(store, episodes=np.arange(len(store.lengths)), frame_gap=1, context=1)
    chosen = np.linspace(0, len(windows) - 1, config.clips).round().astype(int)
    frames = windows.__getitems__(chosen.tolist()).frames
    rng = np.random.default_rng(config.seed)

    def drawn(settings: AugmentConfig, clips: torch.Tensor) -> UInt8[np.ndarray, "b t h w c"]:
        return augment_frames(clips, settings, rng).permute(0, 1, 3, 4, 2).numpy()

    settings = {
        name: value for name, value in vars(config.augment).items() if value and name != "state_noise"
    }
    first = frames[:1].expand(config.draws, *frames.shape[1:])
    out = Path(config.out)
    write_page(
        out,
        Preview(
            data=str(store.path),
            settings=config.augment,
            before=frames.permute(0, 1, 3, 4, 2).numpy(),
            after=np.stack([drawn(config.augment, frames) for _ in range(config.draws)], 1),
            alone={
                f"{name}={value:g}": drawn(replace(AugmentConfig(), **{name: value}), first)
                for name, value in settings.items()
            },
            state_std=None if store.state is None else store.state.std(0).tolist(),
        ),
    )
    return out
