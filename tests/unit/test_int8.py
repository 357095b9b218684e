import copy

import pytest
import torch
from torch import nn

from latentact.device import supports_int8
from latentact.errors import UserError
from latentact.labeling.episode import encode_clip
from latentact.lams.models.lapo import LapoConfig
from latentact.nn.int8 import int8

pytestmark = [
    pytest.mark.skipif(not supports_int8("cpu"), reason="wants a processor that multiplies int8"),
    pytest.mark.usefixtures("inference"),
]


@pytest.fixture
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def narrow(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def test_whole_numbers_stay_exact():
    """A channel's largest weight is 127 and the numbers span 0..255, so that every scale is 1."""
    linear = nn.Linear(128, 128)
    linear.weight.copy_(torch.eye(128))
    linear.weight[:, 5] = 127
    linear.weight[5] = 0
    linear.weight[5, 0], linear.weight[5, 1] = 127, -1
    linear.bias.copy_(torch.arange(128))
    x = torch.zeros(2, 128)
    x[:, 0], x[0, 1], x[0, 7] = 126, 126, 3
    assert narrow(int8(linear), x)[0, [1, 7, 9]].tolist() == [126 + 1, 3 + 7, 9]
    conv = nn.Conv2d(64, 64, 3, 2, padding=1)
    conv.weight.zero_()
    conv.weight[torch.arange(64), torch.arange(64), 1, 1] = 1
    conv.weight[:, 3, 0, 0] = 127
    conv.bias.zero_()
    conv.bias[0] = 5
    x = torch.zeros(1, 64, 8, 8)
    x[0, 0, 4, 4], x[0, 1, 0, 0], x[0, 2, 2, 0] = 100, -55, 200
    y = narrow(int8(conv), x)
    assert y.shape == (1, 64, 4, 4)
    places = ((0, 2, 2), (1, 0, 0), (2, 1, 0), (0, 0, 0), (9, 3, 3))
    assert [y[0][place].item() for place in places] == [105, -55, 200, 5, 0]


@pytest.mark.parametrize("shift", [0.0, -2.0, 3.0])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(200, 100, bias=False), (7, 200)),
        (nn.Linear(200, 100), (200,)),
        (nn.Conv2d(32, 64, 3, padding=1), (32, 9, 8)),
        (nn.Conv2d(64, 32, 4, 2, 1, bias=False), (64, 9, 8)),
        (nn.Conv2d(64, 64, 3, padding=2, dilation=2, groups=2), (64, 9, 8)),
    ],
)
def test_close_to_fp32(layer, shape, batch, shift):
    x = torch.randn(batch, *shape) + shift
    wanted, found = layer(x), narrow(int8(layer), x)
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    assert (found - wanted).norm() < 0.015 * wanted.norm()


def test_a_large_row_does_not_coarsen_others():
    layer = nn.Linear(256, 256)
    x = torch.randn(4, 256)
    alone = narrow(int8(layer), x[1:])
    x[0] *= 1e6
    assert torch.equal(narrow(int8(layer), x)[1:], alone)
    assert not narrow(int8(layer), torch.zeros(1, 256)).sub(layer.bias.bfloat16()).any()


def test_what_wants_precision_keeps_it():
    """Outside autocast, in small layers and in those with other semantics nothing changes."""
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(256, 256),
            "small": nn.Linear(8, 8),
            "reflect": nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
            "same": nn.Conv2d(64, 64, 3, padding="same"),
        }
    )
    before = copy.deepcopy(model)
    fast = int8(model)
    x, image = torch.randn(3, 256), torch.randn(1, 64, 8, 8)
    assert torch.equal(fast["linear"](x), model["linear"](x))
    assert not torch.equal(narrow(fast["linear"], x), narrow(model["linear"], x))
    for name, given in (("small", x[:, :8]), ("reflect", image), ("same", image)):
        assert torch.equal(narrow(fast[name], given), narrow(model[name], given))
    assert torch.equal(narrow(model["linear"], x), narrow(before["linear"], x))
    assert fast["linear"].weight.data_ptr() == model["linear"].weight.data_ptr()
    again = copy.deepcopy(int8(fast))
    assert torch.equal(narrow(again["linear"], x), narrow(fast["linear"], x))


def test_a_lam_keeps_its_codes():
    model = LapoConfig(idm_scale=2).build().eval()
    frames = torch.randint(0, 256, (1, 12, 3, 8, 8), dtype=torch.uint8)
    frames = nn.functional.interpolate(frames[0].float(), (64, 64), mode="bilinear").byte()[None]
    latent = encode_clip(model, frames, "fp32").continuous.reshape(-1, model.bottleneck.embedding.shape[-1])
    model.bottleneck.embedding.copy_(latent[torch.linspace(0, len(latent) - 1, 64).long()])
    exact, quick = encode_clip(model, frames, "fp32"), encode_clip(int8(model), frames, "int8")
    assert (exact.codes == quick.codes).float().mean() > 0.9
    assert 0 < (exact.continuous - quick.continuous).norm() < 0.03 * exact.continuous.norm()


def test_other_devices_are_refused():
    with pytest.raises(UserError, match="int8 must run on a CPU with VNNI, got this meta"):
        int8(nn.Linear(8, 8, device="meta"))
