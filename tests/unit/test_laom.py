"""LAOM's parts by hand: transforms, the averaged target, steps ahead, collapse, labels."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import cli
from latentact.errors import UserError
from latentact.lams.contract import load_lam
from latentact.lams.models.laom import LaomConfig
from latentact.lams.targets import FeatureFdm, TargetConfig, feature_health, pixel_error
from latentact.nn import augment as views
from latentact.quantizers.none import WhitenedConfig
from latentact.quantizers.vq_ema import VqEmaConfig
from latentact.types import ActionSpace, Clip

SMALL = LaomConfig(
    size=32,
    backbone="patch",
    channels=(16,),
    stack=2,
    horizon=3,
    hidden=32,
    bottleneck=WhitenedConfig(dim=4),
    target=TargetConfig(kind="ema_features", features=16, hidden=32, tau=0.25),
)


def clip(model, b: int = 8) -> Clip:
    t = model.context + 1 + model.horizon
    frames = torch.randint(0, 256, (b, t, 3, 32, 32), dtype=torch.uint8)
    return Clip(frames=frames, valid=torch.ones(b, t, dtype=torch.bool), index=torch.arange(b))


def test_published_sizes() -> None:
    config = LaomConfig()
    assert (config.bottleneck.dim, config.horizon, config.stack, config.target.tau) == (8192, 10, 3, 0.001)
    assert LaomConfig(augment="none").build().encoder.conv_stack[2].conv.weight.shape[0] == 192


def test_a_shift_by_one_pixel_moves_the_picture_and_repeats_its_edge() -> None:
    frames = torch.arange(64.0).view(1, 1, 1, 8, 8)
    warp = torch.eye(3)[None].clone()
    warp[0, 0, 2] = 2 / 8  # one pixel to the right in the picture
    seen = torch.nn.functional.grid_sample(
        frames[0], views.warp_grid(warp, 8, 8), padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(seen[0, 0, :, :-1], frames[0, 0, 0, :, 1:])
    torch.testing.assert_close(seen[0, 0, :, -1], frames[0, 0, 0, :, -1])


def test_a_quarter_turn_by_hand() -> None:
    turn = torch.eye(3)[None].clone()
    turn[0, :2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    frame = torch.arange(16.0).view(1, 1, 4, 4)
    seen = torch.nn.functional.grid_sample(frame, views.warp_grid(turn, 4, 4), align_corners=False)
    torch.testing.assert_close(seen, frame.rot90(1, (2, 3)))


def test_perspective_brings_the_padded_corners_back() -> None:
    torch.manual_seed(0)
    warp = views._perspectives(5, torch.device("cpu"))
    inverse = torch.linalg.inv(warp)
    corners = views.MARGIN * torch.tensor([[-1.0, -1.0], [1, -1], [1, 1], [-1, 1]])
    moved = torch.einsum("bij,kj->bki", inverse, torch.cat([corners, torch.ones(4, 1)], 1))
    share = moved[..., :2] / moved[..., 2:] / corners
    assert share.min() >= 0.5 - 1e-4
    assert share.max() <= 1 + 1e-4
    assert share.std() > 0.05


def test_frames_of_a_clip_move_together_and_clips_apart() -> None:
    torch.manual_seed(0)
    frames = torch.rand(1, 1, 3, 32, 32).expand(6, 3, -1, -1, -1)
    seen = views.augment(frames)
    torch.testing.assert_close(seen[:, 0], seen[:, 2])
    assert len({round(each.sum().item(), 2) for each in seen}) > 3
    unchanged = [torch.allclose(a, b, atol=1e-4) for a, b in zip(views.augment(frames), frames, strict=True)]
    assert not all(unchanged)


def test_no_transform_outside_training() -> None:
    model = SMALL.build().eval()
    batch = torch.rand(2, 2, 3, 32, 32)
    assert model._augmented(batch)[0] is batch


def test_average_follows_by_tau() -> None:
    encoder = torch.nn.Linear(2, 2)
    fdm = FeatureFdm(TargetConfig(kind="ema_features", features=2, tau=0.25), 1, encoder, own=False).train()
    before = encoder.weight.detach().clone()
    torch.testing.assert_close(fdm.average.weight, before)
    with torch.no_grad():
        encoder.weight.add_(4.0)
    fdm.update_average(encoder)
    torch.testing.assert_close(fdm.average.weight, before + 1.0)
    fdm.eval().update_average(encoder)
    torch.testing.assert_close(fdm.average.weight, before + 1.0)
    assert [name for name, p in fdm.named_parameters() if "average" in name and p.requires_grad] == []


def test_inverse_dynamics_looks_one_to_k_steps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = replace(SMALL, augment="none").build().train()
    batch = clip(model, b=64)
    number = torch.arange(batch.frames.shape[1], dtype=torch.uint8)  # each frame shows its own number
    frames = number.view(1, -1, 1, 1, 1).expand_as(batch.frames)
    seen = []

    def spy(now, later):
        seen.append((now, later))
        return infer(now, later)

    infer = model._infer
    monkeypatch.setattr(model, "_infer", spy)
    model.loss(replace(batch, frames=frames))
    now, later = (((x[:, :, 0, 0, 0] + 0.5) * 255).round() for x in seen[0])
    assert now.unique(dim=0).tolist() == [[0, 1]]
    assert later.unique(dim=0).tolist() == [[1, 2], [2, 3], [3, 4]]


def test_forward_dynamics_teaches_the_encoder_through_the_latent_only() -> None:
    model = replace(SMALL, augment="none").build().train()
    model.idm.leave.weight.data.zero_()  # no latent action says anything any more
    model.loss(clip(model))[0].backward()
    assert not any(p.grad is not None and p.grad.abs().sum() for p in model.encoder.parameters())


def test_pictures_teach_the_latent_nothing() -> None:
    model = replace(SMALL, augment="none", patch=4, image_channels=(8,)).build().train()
    assert model.pixel_decoder is not None
    x = torch.rand(4, 5, 3, 32, 32) - 0.5
    latent = model._label_latent(x)
    assert not latent.requires_grad
    assert model.training


def test_collapse_is_seen_by_hand() -> None:
    same = feature_health(torch.ones(8, 4))
    assert same["feature_std"].item() == 0
    line = feature_health(torch.arange(8.0)[:, None] * torch.ones(8, 4))
    assert line["feature_rank"].item() == pytest.approx(1, abs=1e-3)
    square = torch.tensor([[1.0, 1.0], [1, -1], [-1, 1], [-1, -1]])
    health = {name: value.item() for name, value in feature_health(square).items()}
    assert health == pytest.approx({"feature_std": 1.0, "feature_rank": 2.0})


def test_pixel_error_by_hand() -> None:
    now, target = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    target[0, 0, 0, 0] = 0.2
    plain, weighted = (pixel_error(now, now, target, weight, 0) for weight in (0.0, 10.0))
    torch.testing.assert_close(plain, torch.tensor(0.04 / 16))
    torch.testing.assert_close(weighted, torch.tensor(3 * 0.04 / 16))


def test_labels_pull_and_their_absence_does_not() -> None:
    space = ActionSpace(kind="continuous", size=2)
    model = replace(SMALL, action_weight=1.0, augment="none").build(space).train()
    model.set_action_stats(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    assert model.action_mean.tolist() == [1.0, 20.0]
    batch = clip(model)
    shown, none = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    hidden = replace(batch, action=torch.zeros(8, 2), labeled=none)
    assert model.loss(hidden)[1]["action"].item() == 0
    known = replace(batch, action=torch.tensor([[5.0, 60.0]] * 8), labeled=shown)
    assert model.loss(known)[1]["action"].item() > 1
    assert replace(SMALL, action_weight=0.0).build(space).action_head is None


def test_what_no_model_can_be_built_from() -> None:
    for wrong in (
        {"target": TargetConfig()},
        {"bottleneck": VqEmaConfig()},
        {"augment": "both"},
        {"horizon": 0},
        {"backbone": "resnet"},
    ):
        with pytest.raises(UserError, match=r"lam\."):
            replace(SMALL, **wrong).build()


def test_trains_through_the_command_line(blocks: Path, tmp_path: Path) -> None:
    arguments = (
        *("train-lam", "experiment=laom_debug", f"data.path={blocks}", "data.resolution=32"),
        *("lam.size=32", "lam.channels=[16]", "lam.image_channels=[8]", "lam.bottleneck.dim=4"),
        *("lam.action_weight=0.1", "labeled_episodes=2", "training.batch_size=8", "training.log_every=1"),
        *("training.checkpoint_every=4", "training.precision=32-true", "training.warmup_steps=2"),
        *("training.eval_every=0",),
    )
    ended = cli(*arguments, f"out={tmp_path / 'whole'}", "training.steps=8")
    assert ended.returncode == 0, ended.stderr
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/feature_rank", "train/feature_std", "train/action", "train/pixels"} <= rows[0].keys()
    model = load_lam(tmp_path / "whole")
    assert model.generative
    assert any(
        name.startswith("fdm.average.") for name in model.state_dict()
    )  # a resumed run goes on with it
    assert model.spec.fps == 10
