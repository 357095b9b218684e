"""LAPO's numbers: the quantizer's update by hand, the constant convolution, the loss on labeled rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentact.errors import UserError
from latentact.lams.contract import action_loss, normalize_frames, transition_windows
from latentact.lams.models.lapo import LapoConfig
from latentact.nn.patch import Keypoints
from latentact.nn.unet import _conv_with_constant, _flattened, _upsampled
from latentact.quantizers.vq_ema import VqEma, VqEmaConfig


def test_published_sizes() -> None:
    model = LapoConfig().build()
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.idm) + count(model.idm_head) == 3_685_376  # IDM of the published code
    assert count(model.fdm) == 7_814_139  # its world model
    assert model.bottleneck.embedding.shape == (2, 64, 16)


def test_vectors_take_strided_elements() -> None:
    quantizer = VqEma(VqEmaConfig(dim=8, codebooks=1, positions=2, codebook_size=2)).eval()
    quantizer.embedding.copy_(torch.tensor([[[0.0, 0, 0, 0], [1, 1, 1, 1]]]))
    x = torch.tensor([[0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9]])  # position 0 at even places, 1 at odd ones
    out = quantizer(x)
    assert out.codes.tolist() == [[0, 1]]
    torch.testing.assert_close(out.vectors, torch.tensor([[0.0, 1, 0, 1, 0, 1, 0, 1]]))
    torch.testing.assert_close(out.loss, torch.tensor(0.05 * 0.01))


def test_codebook_update_by_hand() -> None:
    quantizer = VqEma(VqEmaConfig(dim=1, codebooks=1, positions=1, codebook_size=2, decay=0.5)).train()
    quantizer.embedding.copy_(torch.tensor([[[0.0], [1.0]]]))
    quantizer.ema_weight.copy_(torch.tensor([[[0.0], [1.0]]]))
    quantizer.ema_count.copy_(torch.tensor([[2.0, 2.0]]))
    quantizer(torch.tensor([[0.2], [0.4], [0.9]]))
    # counts: .5*2 + .5*2 = 2 and .5*2 + .5*1 = 1.5; smoothing (c + e) / (n + 2e) * n with n = 3.5 moves them
    # by 1e-5
    torch.testing.assert_close(quantizer.ema_count, torch.tensor([[2.0, 1.5]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.ema_weight, torch.tensor([[[0.3], [0.95]]]))
    torch.testing.assert_close(
        quantizer.embedding, torch.tensor([[[0.15], [0.95 / 1.5]]]), rtol=1e-5, atol=1e-5
    )


def test_constant_channels_cost_nothing_and_change_nothing() -> None:
    torch.manual_seed(0)
    conv, x, latent = nn.Conv2d(6 + 10, 5, 3, padding=1), torch.randn(2, 6, 8, 8), torch.randn(2, 10)
    plain = conv(torch.cat([x, latent[:, :, None, None].expand(-1, -1, 8, 8)], dim=1))
    torch.testing.assert_close(_conv_with_constant(conv, x, latent), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("quick", "conv", "side"),
    [
        (_upsampled, nn.ConvTranspose2d(5, 7, 2, 2), 3),
        (_upsampled, nn.ConvTranspose2d(5, 7, 3, 3), 1),
        (_flattened, nn.Conv2d(5, 7, 3), 3),
    ],
)
def test_convolutions_without_overlap_are_matrix_products(quick, conv: nn.Module, side: int) -> None:
    torch.manual_seed(0)
    x, numbers = torch.randn(2, 5, side, side), []
    for way in (conv, lambda x: quick(conv, x)):
        y = way(x)
        numbers.append((y, *torch.autograd.grad(y.square().sum(), [*conv.parameters()])))
    torch.testing.assert_close(numbers[0], numbers[1], rtol=1e-5, atol=1e-4)


def test_keypoints_are_centers_of_mass() -> None:
    keypoints = Keypoints(in_channels=1, count=2)
    with torch.no_grad():
        keypoints.maps.weight.copy_(torch.tensor([1.0, -1.0])[:, None, None, None])
        keypoints.maps.bias.zero_()
    image = torch.zeros(1, 1, 3, 5)
    image[0, 0, 2, 3], image[0, 0, 2, 4] = 100, 200  # places -1, -0.5, 0, 0.5, 1 across and -1, 0, 1 down
    expected = torch.tensor([[(0.5 * 1 + 1.0 * 4) / 5, 0, 1, 0, 200, 0]])  # the second map is 0 everywhere
    torch.testing.assert_close(keypoints(image), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(keypoints(image), expected)


def test_keypoints_are_of_patch_networks() -> None:
    with pytest.raises(UserError, match=r"lam\.keypoints must be 0 for lam\.backbone=impala, got 4"):
        LapoConfig(keypoints=4)


def test_pairs_are_one_window_per_transition() -> None:
    frames = torch.arange(6, dtype=torch.uint8).view(1, 6, 1, 1, 1)
    valid = torch.tensor([[False, True, True, True, False, True]])
    windows, real = transition_windows(frames, None, context=2, channels=1)
    assert windows.flatten(1).tolist() == [
        [0, 0, 0, 1],
        [0, 0, 1, 2],
        *([i, i + 1, i + 2, i + 3] for i in range(3)),
    ]
    assert real.all()
    windows, real = transition_windows(frames, valid, context=2, channels=1)
    assert real.tolist() == [[False, True, True, False, False]]
    assert windows[real[0]].flatten(1).tolist() == [[1, 1, 1, 2], [1, 1, 2, 3]]
    windows, real = transition_windows(frames[:, :4], valid[:, :4], context=1, last=True, channels=1)
    assert windows.flatten(1).tolist() == [[1, 2, 3]]
    assert real.tolist() == [[True]]


def test_pixels_are_centered() -> None:
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1).expand(1, 2, 3, 32, 32)
    assert normalize_frames(frames, 32).flatten(2).unique().tolist() == [-0.5, 0.5]


def test_action_loss_sees_labeled_rows_only() -> None:
    logits = torch.tensor([[2.0, 0.0], [5.0, -5.0]])
    hidden = action_loss(logits, torch.tensor([1, 0]), torch.tensor([True, False]))
    torch.testing.assert_close(hidden, F.cross_entropy(logits[:1], torch.tensor([1])))
    numbers, first = torch.tensor([[1.0, 2.0], [9.0, 9.0]]), torch.tensor([True, False])
    torch.testing.assert_close(action_loss(torch.zeros(2, 2), numbers, first), torch.tensor(2.5))
    assert action_loss(torch.zeros(2, 2), numbers, torch.zeros(2, dtype=torch.bool)).item() == 0


def test_motion_weight_by_hand() -> None:
    """A frame whose one changed pixel moves by 0.2: that pixel counts 1 + 10 * 0.2 = 3 times."""
    model = LapoConfig(backbone="patch", size=32, motion_weight=10.0, fdm_context=0).build().eval()
    x = torch.zeros(1, 3, 3, 32, 32)
    x[:, 2, :, 0, 0] = 0.2
    model._predict = lambda frames, latent: frames[:, -1]  # type: ignore[method-assign]
    loss = model._reconstruction(x, torch.zeros(1, 128))
    torch.testing.assert_close(loss, torch.tensor(3 * 0.04 / 1024))
