"""villa-X's LAM: the published numbers, windows, ragged clips, damaged files, the proprio FDM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import cli
from latentact.errors import UserError
from latentact.lams.contract import load_lam
from latentact.lams.models.villa_x import VillaX, VillaXConfig
from latentact.types import ActionSpace, Clip

SIZES = {
    "resolution": 28,
    "patch_size": 14,
    "d_t": 4,
    "encoder_depth": 3,
    "encoder_embed_dim": 48,
    "encoder_n_heads": 4,
    "action_latent_dim": 8,
    "num_learned_tokens": 2,
    "map_heads": 6,
    "decoder_depth": 2,
    "decoder_embed_dim": 32,
    "decoder_n_heads": 4,
    "n_codes": 8,
}
TINY = VillaXConfig(**SIZES, guard=False)


def waves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that depend on nothing but names and shapes; position tables stay."""
    filled = {}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        if name.rpartition(".")[2].startswith("pe"):
            filled[name] = tensor
            continue
        numbers = torch.arange(tensor.numel(), dtype=torch.float64)
        noise = (torch.sin(numbers * 12.9898 + i) * 43758.5453).frac().reshape(tensor.shape)
        width = tensor[0].numel() if tensor.ndim > 1 else 25
        gain = name.endswith((".g", "gamma", "norm.weight"))
        filled[name] = (noise * (3 / width) ** 0.5 * 1.5 + gain).float()
    codes = torch.outer(torch.cos(torch.arange(8.0)), torch.tensor([3.0, -3, -5, 1, 6, 0, -5, -2]))
    filled["vq.embedding.weight"] = codes + 2 * filled["vq.embedding.weight"]
    return filled


def video(t: int, h: int = 28, w: int = 28) -> Tensor:
    """Return uint8 frames `[t, 3, h, w]` of crossing waves that move."""
    y, x = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
    step = torch.arange(t).double()[:, None, None, None]
    color = torch.arange(3).double()[:, None, None]
    picture = torch.sin(9 * x + 2.1 * step * (color + 1)) * torch.cos(7 * y + color + 1.3 * step**1.5)
    return (127.5 + 127 * picture).to(torch.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the authors' `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("villa")
    write(folder, waves(TINY.build().state_dict()))
    return folder


def write(folder: Path, weights: dict[str, Tensor], **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    config = {**SIZES, "use_xformers": None, "augment_type": "resize_crop", "pretrained_dino_size": "base"}
    described = {
        "architecture": "IgorModel",
        "description": "",
        "version": 0,
        "config": {**config, **changes},
    }
    (folder / "model_config.json").write_text(json.dumps(described))
    return folder


GOLDEN = {
    "short": (
        video(2),
        [[0, 7]],
        [4.577695, 0.462219, -4.409046, -2.239564, 4.805923, 3.566543, -3.436566, -2.947272],
    ),
    "one window": (
        video(4),
        [[0, 7], [0, 6], [0, 6]],
        [4.728893, -0.945639, -5.374226, -0.795385, 5.457036, 2.356518, -4.586524, -3.211345],
    ),
    "windows": (
        video(7),
        [[0, 7], [0, 6], [0, 6], [0, 6], [0, 0], [0, 0]],
        [4.681701, -2.867112, -6.078755, 0.694774, 5.854982, 0.067494, -5.92328, -2.591625],
    ),
    "resized": (
        video(6, 20, 36),
        [[0, 7], [0, 6], [0, 6], [0, 6], [0, 0]],
        [3.952227, -2.944071, -5.025171, 0.799723, 5.32368, 0.021575, -5.185388, -2.733706],
    ),
}
"""Frames, the codes of all transitions and the second token of the last, by the authors' code."""


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN.keys())
def test_numbers_are_the_published_ones(published: Path, case: tuple) -> None:
    frames, codes, token = case
    latent = load_lam(published).encode(frames)  # one clip, without a batch axis
    assert latent.codes is not None
    assert latent.codes.tolist() == [codes]
    torch.testing.assert_close(latent.continuous[0, -1, 1], torch.tensor(token), rtol=1e-4, atol=1e-4)
    table = load_file(published / "model.safetensors")["vq.embedding.weight"]
    torch.testing.assert_close(latent.vectors, table[latent.codes])


def test_predicted_frame_is_the_published_one(published: Path) -> None:
    model, frames = load_lam(published), video(7)[None]
    frame = model.predict(frames, model.encode(frames).vectors[:, -1])[0]
    assert frame[0, ::9, ::9].tolist() == [
        [174, 132, 236, 171],
        [101, 132, 91, 163],
        [177, 51, 91, 253],
        [150, 135, 186, 163],
    ]
    assert frame.double().mean((1, 2)).tolist() == pytest.approx([126.04592, 119.5676, 106.15689], abs=2e-5)


@pytest.mark.parametrize("window", ["sliding", "chunked"])
@pytest.mark.parametrize(("first", "stop"), [(0, 2), (0, 9), (3, 5), (1, 11), (9, 11)])
def test_padded_clips_give_the_numbers_of_the_clip_alone(
    published: Path, window: str, first: int, stop: int
) -> None:
    model = load_lam(published, window=window)
    frames = torch.stack([video(11), video(11).flip(0)])
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0] = (torch.arange(11) >= first) & (torch.arange(11) < stop)
    latent, alone = model.encode(frames, valid), model.encode(frames[:1, first:stop])
    inside = slice(first, stop - 1)
    torch.testing.assert_close(latent.continuous[:1, inside], alone.continuous, rtol=1e-5, atol=1e-5)
    assert torch.equal(latent.valid.sum(1), torch.tensor([stop - first - 1, 10]))
    torch.testing.assert_close(
        latent.continuous[1:], model.encode(frames[1:]).continuous, rtol=1e-5, atol=1e-5
    )


def test_a_gap_in_a_clip_is_two_clips(published: Path) -> None:
    model, frames = load_lam(published), video(9)[None]
    valid = torch.arange(9)[None] != 4
    latent = model.encode(frames, valid)
    assert latent.valid.tolist() == [[True, True, True, False, False, True, True, True]]
    torch.testing.assert_close(latent.continuous[:, 5:], model.encode(frames[:, 5:]).continuous)


def test_chunks_are_clips_that_share_one_frame(published: Path) -> None:
    model, frames = load_lam(published, window="chunked"), video(9)[None]
    chunks = [model.encode(frames[:, i : i + 4]).continuous for i in (0, 3, 6)]
    torch.testing.assert_close(model.encode(frames).continuous, torch.cat(chunks, 1), rtol=1e-5, atol=1e-5)


def frames_encoded(model: VillaX, **options: bool) -> int:
    """Return how many frames went through the blocks for a clip of 13 frames."""
    seen = 0

    def count(_: object, given: tuple) -> None:
        nonlocal seen
        seen += given[0].shape[0] * given[0].shape[1]

    hook = model.encoder.register_forward_pre_hook(count)
    model.encode(video(13)[None], **options)
    hook.remove()
    return seen


def test_work_per_frame(published: Path) -> None:
    sliding, chunked = load_lam(published), load_lam(published, window="chunked")
    assert isinstance(sliding, VillaX)
    assert isinstance(chunked, VillaX)
    assert frames_encoded(sliding) == 10 * 4  # what the published code does, windows stepping by one
    assert frames_encoded(chunked) == 4 * 4
    assert frames_encoded(sliding, last=True) == frames_encoded(chunked, last=True) == 4


def test_without_decoder(tmp_path: Path) -> None:
    weights = waves(TINY.build().state_dict())
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.")}
    model = load_lam(write(tmp_path / "lam", kept).parent)  # the folder above `lam` does as well
    assert not model.generative
    assert model.encode(video(2)).codes.tolist() == [[[0, 7]]]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="no forward dynamics"):
        model.predict(video(2)[None], torch.zeros(1, 2, 8))
    model.save_pretrained(tmp_path / "ours")
    ours = load_lam(tmp_path / "ours")
    assert not ours.generative
    assert ours.spec.resize == "float"


def test_default_size_is_the_published_one() -> None:
    with torch.device("meta"):
        model = VillaXConfig(guard=False).build()
    assert sum(value.numel() for value in model.state_dict().values()) == 201_330_636


DAMAGED = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "not a complete safetensors file",
    ),
    "not json": (lambda f: (f / "model_config.json").write_text("{"), "cannot read"),
    "a list": (lambda f: (f / "model_config.json").write_text("[]"), "does not describe a villa-X model"),
    "other model": (
        lambda f: (f / "model_config.json").write_text('{"architecture": "Other", "config": {}}'),
        "does not describe a villa-X model",
    ),
    "other width": (lambda f: rewrite(f, encoder_embed_dim=96), "wrong shape for"),
    "less layers": (lambda f: rewrite(f, encoder_depth=2), "has unknown 'encoder.layers.2"),
    "more layers": (lambda f: rewrite(f, decoder_depth=3), "lacks 'decoder.layers.2"),
    "a path for a number": (
        lambda f: rewrite(f, d_t="$CONFIG_PATH/../../etc/passwd"),
        "lam.d_t must be of type int, got '\\$CONFIG",
    ),
    "a boolean": (lambda f: rewrite(f, d_t=True), "lam.d_t must be of type int, got True"),
    "an absurd number": (
        lambda f: rewrite(f, encoder_embed_dim=10**12),
        "lam.encoder_embed_dim must be between",
    ),
    "uneven patches": (lambda f: rewrite(f, patch_size=5), "must be a multiple of lam.patch_size"),
    "gray": (lambda f: rewrite(f, in_channels=1), "in_channels must be 3"),
    "a null": (lambda f: rewrite(f, mlp_ratio=None), "lam.mlp_ratio must be of type float, got None"),
    "a setting of ours": (lambda f: rewrite(f, window="chunked", kind="lapo"), None),
}


def rewrite(folder: Path, **changes: object) -> None:
    said = json.loads((folder / "model_config.json").read_text())
    said["config"] |= changes
    (folder / "model_config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(("damage", "sentence"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_one_sentence(tmp_path: Path, damage, sentence: str | None) -> None:
    folder = write(tmp_path / "villa", waves(TINY.build().state_dict()))
    damage(folder)
    if sentence is None:  # nothing in the file but sizes is heeded
        assert load_lam(folder).config == TINY
        return
    with pytest.raises(UserError, match=sentence):
        load_lam(folder)


def clip(config: VillaXConfig, missing: int = 0, **more: Tensor) -> Clip:
    frames = torch.stack([video(config.d_t), video(config.d_t).flip(0)])
    valid = (torch.arange(config.d_t) >= missing).expand(2, -1)
    return Clip(frames=frames, valid=valid, index=torch.arange(2), **more)


def test_loss_never_looks_at_frames_that_are_not_there() -> None:
    torch.manual_seed(0)
    model = TINY.build().eval()
    batch = clip(TINY, missing=1)
    noise = batch.frames.clone()
    noise[:, 0] = torch.randint(0, 256, noise[:, 0].shape, dtype=torch.uint8)
    assert model.loss(batch)[0] == model.loss(replace(batch, frames=noise))[0]
    assert model.loss(clip(TINY))[0] != model.loss(replace(clip(TINY), frames=noise))[0]


def test_crops_are_random_in_training_only() -> None:
    torch.manual_seed(0)
    model, batch = TINY.build(), clip(TINY)
    assert model.loss(batch)[0] != model.loss(batch)[0]
    assert model.eval().loss(batch)[0] == model.loss(batch)[0]
    still = replace(TINY, augment=False).build()
    assert still.loss(batch)[0] == still.loss(batch)[0]


def test_proprio_learns_the_next_state_and_labeled_actions() -> None:
    torch.manual_seed(0)
    config = replace(TINY, state_size=3, state_weight=1.0, action_weight=2.0, augment=False)
    model = config.build(ActionSpace(kind="continuous", size=2))
    state = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    hidden, first = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([True, False])
    states = torch.stack([*[state] * (config.d_t - 1), state + 1], dim=1)
    batch = clip(config, states=states, action=hidden, labeled=first)
    loss, metrics = model.loss(batch)
    parts = metrics["recon"] + metrics["vq"] + metrics["state"] + 2 * metrics["action"]
    assert loss.item() == pytest.approx(parts.item())
    nothing = replace(batch, labeled=torch.zeros(2, dtype=torch.bool))
    assert model.loss(nothing)[1]["action"] == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.proprio.parameters())
    with pytest.raises(UserError, match=r"size of the data's robot state, 0, got"):
        model.loss(clip(config, action=hidden, labeled=first))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window": "all"}, "must be sliding or chunked"),
        ({"state_weight": 1.0}, "lam.state_size must be the size"),
        ({"d_t": 1}, "at least 2 frames"),
        ({"encoder_n_heads": 7}, "must be a multiple of lam.encoder_n_heads"),
    ],
)
def test_settings_that_fit_no_model(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(TINY, **changes)


def test_trains_through_the_command_line(blocks: Path, tmp_path: Path) -> None:
    done = cli(
        *("train-lam", "experiment=villa_x_debug", f"data.path={blocks}", f"out={tmp_path / 'run'}"),
        *("training.steps=3", "probe_transitions=16", "lam.encoder_depth=1", "lam.action_weight=1"),
        "labeled_episodes=2",
    )
    assert done.returncode == 0, done.stderr
    model = load_lam(tmp_path / "run")
    assert isinstance(model, VillaX)
    assert (model.context, model.spec.fps, model.spec.model) == (2, 10.0, "villa_x")
