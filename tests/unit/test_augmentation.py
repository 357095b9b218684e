"""Augmentation of training batches: what is drawn, per clip, and what stays as it is."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from latentact import UserError
from latentact.data.samples import PolicyBatch
from latentact.data.transforms import AugmentConfig, augment_batch, augment_frames
from latentact.lams.models.lapo import LapoConfig
from latentact.policies.bc import BcConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, robot_action_target
from latentact.training.fit import fit
from latentact.training.settings import TrainingConfig
from latentact.types import ActionSpace, Clip


def rng(*draws: Any) -> np.random.Generator:
    """Return a generator with given draws, in turn."""
    waiting = [np.array(draw) for draw in draws]
    names: list[str] = ["integers", "uniform", "random", "standard_normal"]
    methods: dict[str, Any] = dict.fromkeys(names, lambda *_: waiting.pop(0))
    return type("Given", (np.random.Generator,), methods)(np.random.PCG64())


def frames(*rows: Any) -> torch.Tensor:
    """Return one gray-in-three-channels clip of one frame from its rows of pixels."""
    return torch.tensor(rows, dtype=torch.uint8)[None, None, None].expand(1, 1, 3, -1, -1)


def test_shift_repeats_the_edge() -> None:
    image = frames([1, 2, 3], [4, 5, 6], [7, 8, 9])
    down_left = augment_frames(image, AugmentConfig(shift=1), rng([[-1, 1]]))
    assert down_left[0, 0, 0].tolist() == [[2, 3, 3], [2, 3, 3], [5, 6, 6]]
    up = augment_frames(image, AugmentConfig(shift=2), rng([[2, 0]]))
    assert up[0, 0, 2].tolist() == [[7, 8, 9]] * 3


def test_colors_by_hand() -> None:
    pixel = torch.tensor([100, 50, 200], dtype=torch.uint8).view(1, 1, 3, 1, 1)
    gray = 0.299 * 100 + 0.587 * 50 + 0.114 * 200  # 82.05
    settings = AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.5)
    brighter = augment_frames(pixel, settings, rng([[1, 0, 0]]))
    assert brighter.flatten().tolist() == [150, 75, 255]
    grayer = augment_frames(pixel, settings, rng([[0, 0, -1]]))
    assert grayer.flatten().tolist() == [round((v + gray) / 2) for v in (100, 50, 200)]
    two = frames([100, 200])  # mean 150
    assert augment_frames(two, settings, rng([[0, -1, 0]]))[0, 0, 0].tolist() == [[125, 175]]


def test_blur_and_cutout_by_hand() -> None:
    point = frames([0, 0, 0], [0, 160, 0], [0, 0, 0])
    blurred = augment_frames(point, AugmentConfig(blur=1.0), rng([1.0]))
    assert blurred[0, 0, 0].tolist() == [[10, 20, 10], [20, 40, 20], [10, 20, 10]]
    cut = augment_frames(
        torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8),
        AugmentConfig(cutout=0.5),
        rng([1.0], [[0.0, 1.0]]),
    )
    assert cut[0, 1, 0].tolist() == [[0, 0, 0, 128], [0] * 4, [0] * 4, [0] * 4]


ALL = AugmentConfig(shift=3, brightness=0.3, contrast=0.3, saturation=0.3, blur=0.5, cutout=0.4)


def test_one_draw_per_clip() -> None:
    one = torch.randint(256, (1, 1, 3, 16, 16), dtype=torch.uint8).expand(4, 3, -1, -1, -1)
    out = augment_frames(one, ALL, np.random.default_rng(0))
    assert all(torch.equal(out[:, 0], out[:, t]) for t in (1, 2)), "all frames of a clip get the same"
    assert len({tuple(clip.flatten().tolist()) for clip in out}) == 4, "clips differ"
    with torch.autocast("cpu", torch.bfloat16):
        again = augment_frames(one, ALL, np.random.default_rng(0))
    assert torch.equal(out, again), "at any precision of training"


def test_targets_stay_as_they_are() -> None:
    images = torch.randint(256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    clip = Clip(frames=images, valid=torch.ones(2, 3, dtype=torch.bool), index=torch.arange(2),
                state=torch.zeros(2, 2), states=torch.ones(2, 3, 2))  # fmt: skip
    config = AugmentConfig(shift=2, brightness=0.4, state_noise=0.5)
    out = augment_batch(clip, config, np.random.default_rng(0))
    assert out.frames is images
    assert out.states is clip.states
    assert out.observed is not None
    assert not torch.equal(out.idm_frames, images)
    assert out.state_noise is not None
    assert out.state_noise.shape == (2, 2)
    batch = PolicyBatch(frames=images, state=torch.full((2, 2), 5.0), words=torch.zeros(2, 0),
                        target=torch.ones(2, 1, 1), mask=torch.ones(2, 1, dtype=torch.bool))  # fmt: skip
    noise = np.array([[1.0, -1], [2, 0]])
    only_state = AugmentConfig(state_noise=0.5)
    moved = augment_batch(batch, only_state, rng(noise), torch.tensor([10.0, 100]))
    assert moved.state is not None
    assert moved.state.tolist() == [[10, -45], [15, 5]]  # 5 + 0.5 * noise * deviation
    assert moved.frames is images
    assert moved.target is batch.target


class Mean(nn.Module):
    """Learn the mean brightness of what it observes."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def loss(self, batch: Clip) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the squared distance to the mean."""
        return (batch.idm_frames.float().mean() / 255 - self.level).square(), {}


class Noise(Dataset):
    """Clips of random frames."""

    def __len__(self) -> int:
        """Return their number."""
        return 32

    def __getitems__(self, positions: list[int]) -> Clip:
        """Return a batch."""
        values = torch.tensor(positions, dtype=torch.uint8) * 8
        return Clip(
            frames=values.view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 8, 8),
            valid=torch.ones(len(values), 2, dtype=torch.bool),
            index=torch.tensor(positions),
        )


def losses(out: Path) -> list[float]:
    """Return the logged losses."""
    with (out / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def trained(out: Path, steps: int, augment: AugmentConfig, **more: Any) -> list[float]:
    """Train and return the losses of every step."""
    config = TrainingConfig(steps=steps, batch_size=4, lr=1e-2, log_every=1, device="cpu", eval_every=0,
                            precision="32-true", warmup_steps=0, final_lr_factor=1.0, augment=augment,
                            **more)  # fmt: skip
    torch.manual_seed(0)
    fit(Mean(), Noise(), config, out, augments=("frames",))
    return losses(out)


def test_a_resumed_training_repeats_the_draws(tmp_path: Path) -> None:
    bright = AugmentConfig(brightness=0.5)
    whole = trained(tmp_path / "whole", 4, bright)
    assert trained(tmp_path / "parts", 2, bright) == whole[:2]
    assert trained(tmp_path / "parts", 4, bright) == whole, "the second half is drawn as in one go"


def test_inputs_that_a_model_does_not_augment_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must not change the state, because only the frames .* shift=2"):
        trained(tmp_path / "run", 2, AugmentConfig(shift=2, state_noise=0.1))
    with pytest.raises(UserError, match=r"augment\.brightness must be between 0 and 1, got 2\.0"):
        AugmentConfig(brightness=2.0)


def test_models_name_what_can_be_augmented() -> None:
    assert LapoConfig(size=32, idm_scale=1, fdm_base=4).build().augments == ("frames",)
    assert LapoConfig(backbone="cells", size=5, frame_channels=2).build().augments == (), (
        "grids are no images"
    )
    space = ActionSpace(kind="continuous", size=2)
    spec = PolicySpec(resolution=5, state_size=2, target=robot_action_target(space, "bc"), action_space=space)
    found = {
        backbone: BcConfig(network=NetworkConfig(backbone=backbone, use_state=True)).build(spec).augments
        for backbone in ("impala", "grid", "state")
    }
    assert found == {"impala": ("frames", "state"), "grid": ("state",), "state": ("state",)}
