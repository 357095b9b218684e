"""LAQ beside numbers of LAPA's own code, its files, and what the sane version does differently."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from conftest import cli
from latentact import check_lam
from latentact.errors import UserError
from latentact.labeling.episode import encode_clip
from latentact.lams.contract import load_lam
from latentact.lams.models.laq import Laq, LaqConfig, _distinct
from latentact.nn.cvivit import CELLS, PositionalConv, PositionBias, reduction
from latentact.quantizers.nsvq import NsvqConfig
from latentact.types import Clip

TINY = LaqConfig(
    size=32,
    patch=4,
    dim=16,
    heads=2,
    head_dim=8,
    spatial_depth=2,
    temporal_depth=2,
    bottleneck=NsvqConfig(dim=16, positions=4, codebook_size=8),
    compat=True,
)


def wave(shape: torch.Size, seed: int, scale: float) -> Tensor:
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(places * (1.3 + 0.017 * seed) + seed)).float().reshape(shape)


def published() -> dict[str, Tensor]:
    """Weights of LAPA's names and tiny sizes that any program can compute."""
    own = {k.removeprefix("net."): v for k, v in LaqConfig.build(TINY).state_dict().items()}
    own = {k.replace("bottleneck.", "vq."): v for k, v in own.items() if k[11:] not in ("used", "step")}
    own = {re.sub(r"(layers\.\d\.0)\.(weight|bias)$", r"\1.dsconv.\2", k): v for k, v in own.items()}
    own = {k: v.unsqueeze(1) if k.endswith("dsconv.weight") else v for k, v in own.items()}
    weights = {}
    for seed, name in enumerate(sorted(own)):
        gain = name.endswith(("gamma", "_scale")) or (name.endswith(".weight") and own[name].ndim == 1)
        scale = 0.12 if name == "vq.codebooks" else 0.3
        weights[name] = float(gain) + wave(own[name].shape, seed, scale)
    return weights


def clips() -> Tensor:
    i = torch.arange(2 * 3 * 3 * 32 * 32, dtype=torch.float64)
    return (127.5 * (1 + torch.sin(i * 0.013) * torch.cos(i * i * 1e-6))).round().byte().view(2, 3, 3, 32, 32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({f"module.{name}": value for name, value in published().items()}, tmp_path / "laq.pt")
    return tmp_path / "laq.pt"


def load(path: Path, **keywords) -> Laq:
    model = load_lam(path, image_size=32, **keywords)
    assert isinstance(model, Laq)
    return model


@torch.inference_mode()
def test_numbers_of_the_published_code(file: Path) -> None:
    model = load(file)
    latent = model.encode(clips())
    assert latent.codes is not None
    assert latent.codes.tolist() == [[[6, 2, 6, 6], [6, 2, 2, 6]], [[6, 2, 2, 6], [6, 2, 6, 2]]]
    expected = [
        *(0.090602, -0.112199, 0.214348, 0.122172, 0.110094, -0.093752, -0.067757, 0.209492),
        *(0.177284, -0.121421, -0.174758, 0.095627, 0.138113, -0.104085, 0.227114, -0.056888),
    ]  # fmt: skip
    near = {"rtol": 1e-4, "atol": 3e-6}
    torch.testing.assert_close(latent.continuous[..., 0].flatten(), torch.tensor(expected), **near)
    norms = [
        *(0.175183, 0.215852, 0.462814, 0.259414, 0.250862, 0.195909, 0.136561, 0.414548),
        *(0.463428, 0.25432, 0.334033, 0.207108, 0.270888, 0.194193, 0.499177, 0.10081),
    ]  # fmt: skip
    torch.testing.assert_close(latent.continuous.norm(dim=-1).flatten(), torch.tensor(norms), **near)
    assert torch.equal(latent.vectors, model.bottleneck.codebooks[latent.codes])
    pixels, latents = clips()[:, :2].flatten(0, 1), latent.vectors.flatten(0, 1)
    recon = model.reconstruct(pixels.float().unsqueeze(1) / 255, latents.flatten(1)).unflatten(0, (2, 2))
    at = [
        *(-0.350531, 0.836368, -0.817604, -0.560709, 1.017271, -0.964219),
        *(-0.160282, 0.639853, -0.620267, 0.011249, 0.533472, -0.581984),
    ]  # fmt: skip
    torch.testing.assert_close(recon[..., 5, 7].flatten(), torch.tensor(at), **near)
    mean = [
        *(-0.03449, 0.062624, -0.066737, -0.055764, 0.084372, -0.088357),
        *(-0.042205, 0.070717, -0.074983, -0.027716, 0.055103, -0.058677),
    ]  # fmt: skip
    torch.testing.assert_close(recon.mean((3, 4)).flatten(), torch.tensor(mean), **near)
    shown = model.predict(clips()[:, :1], latent.vectors[:, 0])
    torch.testing.assert_close(shown.float(), (recon[:, 0] * 255).clamp(0, 255), rtol=0, atol=0.51)


def test_published_size() -> None:
    with torch.device("meta"):
        model = LaqConfig(compat=True).build()
    assert sum(p.numel() for p in model.parameters()) == 343_796_080
    assert (model.spec.tokens, model.spec.token_dim, model.spec.codebook_size) == (4, 32, 8)


@pytest.mark.parametrize("cells", [1, 2, 4, 16, 64, 256])
def test_every_number_of_codes_has_its_head(cells: int) -> None:
    side = {16: 16, 64: 16, 256: 32}.get(cells, 8)
    bottleneck = replace(TINY.bottleneck, dim=4 * cells, positions=cells)
    model = replace(TINY, size=2 * side, patch=2, bottleneck=bottleneck).build().eval()
    latent = model.encode(torch.randint(0, 256, (1, 2, 3, 40, 30), dtype=torch.uint8))
    assert latent.codes is not None
    assert latent.codes.shape == (1, 1, cells)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"positions=4 cells, as 8 does, got 12\. Change lam\.patch"):
        replace(TINY, size=48)
    with pytest.raises(UserError, match=r"multiple of lam\.patch"):
        replace(TINY, size=30)
    with pytest.raises(UserError, match="must be one of 1, 2, 4"):
        replace(TINY, bottleneck=replace(TINY.bottleneck, positions=8))


def test_smaller_patches_halve_the_grid_more_often() -> None:
    for grid in (7, 8, 14, 16, 32):
        small = replace(TINY, compat=False, size=4 * grid, patch=4)
        model = small.build().eval()
        frames = torch.randint(0, 256, (2, 3, 3, 4 * grid, 4 * grid), dtype=torch.uint8)
        assert model.encode(frames).vectors.shape[2] == 4
    assert reduction(8, 4) == CELLS[4]
    assert reduction(12, 4) is None


def test_a_residual_decoder_starts_close_to_the_current_frame() -> None:
    torch.manual_seed(0)
    model = replace(TINY, compat=False, residual=True).build().eval()
    check_lam(model)
    frames = clips()[:, :2]
    vectors = model.encode(frames).vectors[:, 0]
    change = model.predict(frames[:, :1], vectors).int() - frames[:, 0].int()
    assert change.abs().max() <= 5
    torch.nn.init.zeros_(model.net.to_pixels_first_frame[0].weight)
    torch.nn.init.zeros_(model.net.to_pixels_first_frame[0].bias)
    assert torch.equal(model.predict(frames[:, :1], vectors), frames[:, 0])


def test_the_amplified_difference_reaches_the_encoder_only() -> None:
    torch.manual_seed(0)
    plain = replace(TINY, compat=False).build().eval()
    gained = replace(TINY, compat=False, difference_gain=3.0).build().eval()
    gained.load_state_dict(plain.state_dict())
    first = torch.full((1, 1, 3, TINY.size, TINY.size), 100, dtype=torch.uint8)
    pair, triple = (torch.cat([first, first + change], dim=1) for change in (10, 30))
    amplified, tripled = (m.encode(x).continuous[:, 0] for m, x in ((gained, pair), (plain, triple)))
    assert torch.allclose(amplified, tripled, atol=1e-4)
    vectors = plain.encode(pair).vectors[:, 0]
    assert torch.equal(gained.predict(first, vectors), plain.predict(first, vectors))


def test_options_beyond_the_published_model_are_not_compatible_with_it() -> None:
    for option in ({"residual": True}, {"motion_weight": 1.0}, {"difference_gain": 2.0}):
        with pytest.raises(UserError, match=r"lam\.compat must be false"):
            replace(TINY, compat=True, **option)


def test_files_of_lapa(file: Path, tmp_path: Path) -> None:
    codes = load(file).encode(clips()).codes
    assert torch.equal(load(file.parent).encode(clips()).codes, codes)  # a folder that holds it
    weights = published()
    averaged = {f"ema_model.{k}": v for k, v in weights.items()}
    averaged |= {f"online_model.{k}": torch.zeros_like(v) for k, v in weights.items()}
    torch.save(averaged | {"initted": torch.tensor(True), "step": torch.tensor(7)}, tmp_path / "vae.7.ema.pt")
    assert torch.equal(load(tmp_path / "vae.7.ema.pt").encode(clips()).codes, codes)
    load(file).save_pretrained(tmp_path / "ours")
    ours = load_lam(tmp_path / "ours")
    assert torch.equal(ours.encode(clips()).codes, codes)
    assert ours.spec.resize == "pillow"


def damaged(weights: dict[str, Tensor], how: str) -> dict:
    name = "dec_spatial_transformer.layers.1.2.to_q.weight"
    changes = {
        "lacks": {name: None},
        "unknown": {"enc_spatial_transformer.layers.1.7.weight": torch.zeros(2)},
        "shape": {name: torch.zeros(3, 3)},
        "whole numbers": {name: weights[name].long()},
        "no tensor": {"vq.codebooks": "codes"},
        "no codebook": {"vq.codebooks": None},
    }
    return {k: v for k, v in (weights | changes[how]).items() if v is not None}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("lacks", "lacks 'dec_spatial_transformer.layers.1.2.to_q.weight'"),
        ("unknown", "has unknown weights 'enc_spatial_transformer.layers.1.7.weight'"),
        ("shape", "has a wrong shape for 'dec_spatial_transformer.layers.1.2.to_q.weight'"),
        ("whole numbers", "has a wrong shape for"),
        ("no tensor", "must hold LAPA's 'vq.codebooks'"),
        ("no codebook", "must hold LAPA's 'vq.codebooks'"),
    ],
)
def test_damaged_files_are_refused(how: str, said: str, tmp_path: Path) -> None:
    torch.save(damaged(published(), how), tmp_path / "laq.pt")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "laq.pt")


def test_another_number_of_codes_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match="code_seq_len"):
        load(file, code_seq_len=1)
    with pytest.raises(
        UserError, match=r"does not fit image_size=256 and code_seq_len=4\. .* convert-lam .* --image-size N"
    ):
        load_lam(file)  # it is no 256 pixel model


def test_other_files_are_not_taken_for_a_laq(tmp_path: Path) -> None:
    torch.save({"idm": {}, "wm": {}}, tmp_path / "other.pt")
    assert LaqConfig.read_published(tmp_path / "other.pt") is None
    assert LaqConfig.read_published(tmp_path / "nothing.txt") is None


def test_position_bias_is_that_of_all_pairs() -> None:
    bias = PositionBias(8, 2)
    places = torch.tensor([(y, x) for y in range(3) for x in range(4)]).float()
    offset = places[:, None] - places
    plain = bias.net(offset.sign() * (offset.abs() + 1).log()).permute(2, 0, 1)
    torch.testing.assert_close(bias(3, 4), plain)


@pytest.mark.parametrize("t", [1, 2, 4])
def test_positional_convolution_is_a_causal_conv3d(t: int) -> None:
    conv, x = PositionalConv(6), torch.randn(2, t, 5, 4, 6)
    padded = F.pad(x.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
    plain = F.conv3d(padded, conv.weight.unsqueeze(1), conv.bias, groups=6).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(conv(x), plain, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_frame_is_looked_at_once_for_both_of_its_transitions() -> None:
    torch.manual_seed(0)
    model, frames = replace(TINY, compat=False).build().eval(), clips().repeat(1, 2, 1, 1, 1)
    windows = torch.stack([frames[0, :-1], frames[0, 1:]], 1)
    with mock.patch.object(model.net, "spatial_tokens", wraps=model.net.spatial_tokens) as look:
        together = model.encode(frames[:1])
        assert sum(call.args[0].shape[0] for call in look.call_args_list) == 3  # six frames, two of each
        look.reset_mock()
        rows = model.encode(windows, last=True)
        assert sum(call.args[0].shape[0] for call in look.call_args_list) == 3
    alone = torch.cat([model.encode(window[None]).continuous for window in windows])
    torch.testing.assert_close(together.continuous[0], alone[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows.continuous, alone, rtol=1e-4, atol=1e-6)


def test_distinct_frames() -> None:
    frames = torch.tensor([5, 7, 5, 9], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    found, place = _distinct(frames)
    assert len(found) == 3
    assert torch.equal(found[place], frames)


@torch.inference_mode()
def test_bf16_keeps_the_codes() -> None:
    torch.manual_seed(0)
    exact = replace(TINY, compat=False, dim=64).build().eval()
    frames = torch.randint(0, 256, (1, 1, 3, 4, 4), dtype=torch.uint8).repeat(1, 24, 1, 1, 1)
    frames = (frames.float() + 90 * torch.rand(1, 24, 3, 4, 4)).clamp(max=255).byte()
    delta = exact.encode(frames).continuous
    rows = delta.flatten(0, 2)[:: 24 * 4 // 8][:8]
    exact.bottleneck.codebooks.copy_(rows)
    a, b = (encode_clip(exact, frames, precision) for precision in ("fp32", "bf16"))
    assert len(a.codes.unique()) == 8
    assert (a.codes == b.codes).float().mean() > 0.9
    assert not torch.equal(a.continuous, b.continuous)
    assert (a.continuous - b.continuous).norm() < 0.05 * a.continuous.norm()


def still_with_a_bright_block(b: int, seed: int) -> Clip:
    """Pairs of frames in which a block is at one of four places, and then at another."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.full((b, 2, 3, 32, 32), 60, dtype=torch.uint8)
    for clip in frames:
        for frame, place in zip(clip, torch.randperm(4, generator=generator), strict=False):
            y, x = 16 * (int(place) // 2) + 2, 16 * (int(place) % 2) + 2
            frame[:, y : y + 12, x : x + 12] = 230
    return Clip(frames=frames, valid=torch.ones(b, 2, dtype=torch.bool), index=torch.arange(b))


def test_from_scratch_it_collapses_as_published_and_not_with_the_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("latentact.quantizers.usage.PERIOD", 10)
    used = {}
    for guard in (False, True):
        torch.manual_seed(0)
        bottleneck = replace(TINY.bottleneck, guard=guard)
        model = replace(TINY, spatial_depth=1, temporal_depth=1, bottleneck=bottleneck).build().train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for step in range(32):
            loss, metrics = model.loss(still_with_a_bright_block(8, step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        used[guard] = metrics["perplexity"].item()
    assert used[False] < 2
    assert used[True] > 3


def test_trains_and_resumes_from_the_command_line(blocks: Path, tmp_path: Path) -> None:
    def train(out: Path, steps: int) -> None:
        done = cli(
            *("train-lam", "experiment=laq_debug", f"data.path={blocks}", f"out={out}"),
            *("data.resolution=32", "lam.size=32", "lam.patch=4", "lam.dim=32", f"training.steps={steps}"),
            *("training.log_every=2", "training.checkpoint_every=2", "training.precision=32-true"),
        )
        assert done.returncode == 0, done.stderr

    train(tmp_path / "lam", 4)
    model = load_lam(tmp_path / "lam")
    assert isinstance(model, Laq)
    assert not model.config.compat
    assert "train/perplexity" in (tmp_path / "lam/metrics.csv").read_text()
    frames = torch.randint(0, 256, (1, 3, 3, 48, 64), dtype=torch.uint8)
    latent = model.encode(frames)
    assert model.predict(frames[:, :1], latent.vectors[:, 0]).shape == (1, 3, 32, 32)


def test_pictures_are_resized_by_pil() -> None:
    frames = torch.randint(0, 256, (1, 2, 3, 48, 60), dtype=torch.uint8)
    seen = TINY.build()._pixels(frames)
    for frame, pixels in zip(frames[0], seen[0], strict=True):
        picture = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        wanted = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        assert torch.equal(pixels, wanted)
