"""Features of frozen backbones: transformers and timm with random weights, cached, resumed, learned from."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import latentact.labeling.features as frozen
from conftest import cli
from latentact.data.cache import DataConfig, open_store
from latentact.data.store import FrameStore
from latentact.data.windows import Clips
from latentact.errors import UserError
from latentact.lams.contract import load_lam
from latentact.lams.models.lapo import LapoConfig
from latentact.lams.targets import TargetConfig
from latentact.quantizers.none import WhitenedConfig


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a vision transformer of transformers: 32 pixels, patches of 8, 24 numbers per patch."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def store(blocks: Path, tmp_path: Path) -> FrameStore:
    return open_store(DataConfig(path=str(blocks), resolution=32, cache_dir=str(tmp_path / "cache")))


def target(backbone: object, **more) -> TargetConfig:
    return TargetConfig(kind="frozen_features", backbone=str(backbone), hidden=32, **more)


def test_a_vision_transformer_gives_its_patches_as_a_map(vit: Path, store: FrameStore) -> None:
    from transformers import ViTModel

    features = frozen.frozen_features(store, target(vit, grid=2))
    assert features.shape == (96, 2 * 2 * 24)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in frozen.IMAGENET)
    x = (torch.from_numpy(np.array(store.frames[5:6])).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        tokens = ViTModel.from_pretrained(vit).eval()(pixel_values=x).last_hidden_state[0, 1:]
    corner = tokens.view(4, 4, 24)[:2, 2:].mean((0, 1))  # upper right of 2x2 cells
    np.testing.assert_allclose(features[5].reshape(24, 2, 2)[:, 0, 1], corner, rtol=2e-3, atol=2e-3)


def test_timm_gives_its_last_feature_map(store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def random_weights(name: str, pretrained: bool, **options):
        assert pretrained
        torch.manual_seed(0)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", random_weights)
    backbone, weights = frozen.load_backbone("timm/test_resnet", "cpu")
    maps = backbone(torch.from_numpy(store.frames[:2]).permute(0, 3, 1, 2))
    assert maps.ndim == 4
    assert maps.shape[0] == 2
    assert maps.shape[2] == maps.shape[3]
    assert frozen.load_backbone("timm/test_resnet", "cpu")[1] == weights


def test_computed_once_and_again_for_other_weights(vit: Path, store: FrameStore, tmp_path: Path) -> None:
    from transformers import ViTModel

    first = frozen.frozen_features(store, target(vit))
    path = Path(first.filename)
    written = path.stat().st_mtime_ns
    assert np.array_equal(frozen.frozen_features(store, target(vit)), first)
    assert path.stat().st_mtime_ns == written
    model = ViTModel.from_pretrained(vit)
    model.layernorm.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    other = frozen.frozen_features(store, target(tmp_path / "other"))
    assert other.filename != first.filename
    assert not np.array_equal(other, first)


def test_a_killed_run_goes_on_with_the_same_bytes(
    vit: Path, store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "_BATCH", 16)
    whole = bytes(frozen.frozen_features(store, target(vit)))
    entry = Path(frozen.frozen_features(store, target(vit)).filename).parent
    partial = entry.with_name(f"{entry.name}.partial")
    (entry / "features").rename(partial)
    (entry / "size").unlink()
    entry.rmdir()
    with partial.open("r+b") as file:  # killed in the middle of the third batch of 16
        file.truncate(len(whole) // 96 * 40)
    seen = []
    load = frozen.load_backbone

    def counted(name: str, device: str):
        backbone, weights = load(name, device)
        return lambda frames: seen.append(len(frames)) or backbone(frames), weights

    monkeypatch.setattr(frozen, "load_backbone", counted)
    assert bytes(frozen.frozen_features(store, target(vit))) == whole
    assert sum(seen[1:]) == 96 - 32  # the first call finds the size


def test_clips_carry_the_features_of_their_frames(store: FrameStore) -> None:
    features = np.arange(len(store.frames), dtype=np.float16)[:, None]
    clips = Clips(store, episodes=[0, 1], frame_gap=2, context=1, horizon=2, features=features)
    clip = clips.clip(np.array([0, 3]))
    assert clip.features[..., 0].tolist() == [[0, 0, 2, 4], [1, 3, 5, 7]]
    assert clips.clip(np.array([3])).frames.shape[1] == 4


def test_what_cannot_be_used_is_one_sentence(store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"lam.target.backbone must be timm/NAME"):
        frozen.frozen_features(store, target("/nowhere/at/all"))
    with pytest.raises(UserError, match=r"lam.target.backbone must be timm/NAME"):
        frozen.frozen_features(store, target("timm/no_such_network"))
    for name in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("timm/resnet18", "somebody/something"):
        with pytest.raises(UserError, match=r"latentact\[features\]"):
            frozen.frozen_features(store, target(name))
    for wrong in (
        {"kind": "words"},
        {"kind": "frozen_features"},
        {"backbone": "timm/resnet18"},
        {"tau": 0.0},
    ):
        with pytest.raises(UserError, match=r"lam\.target"):
            TargetConfig(**wrong)
    with pytest.raises(UserError, match="train-lam"):
        replace(LAPO, target=target("any")).build()


LAPO = LapoConfig(size=32, backbone="patch", patch=4, idm_channels=(16,), bottleneck=WhitenedConfig(dim=4))


def test_a_lam_learns_from_frozen_features_and_works_without_the_backbone(
    vit: Path, blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = cli(
        *("train-lam", f"data.path={blocks}", f"out={tmp_path / 'lam'}", "data.resolution=32", "lam.size=32"),
        *("lam.backbone=patch", "lam.patch=4", "lam.idm_channels=[16]", "lam.bottleneck.kind=none"),
        *("lam.bottleneck.dim=4", "lam.target.kind=frozen_features", f"lam.target.backbone={vit}"),
        *("lam.target.hidden=32", "training.steps=60", "training.batch_size=32", "training.lr=0.003"),
        *("training.precision=32-true", "training.eval_every=0", "held_out=0.5"),
    )
    assert ended.returncode == 0, ended.stderr
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = load_lam(tmp_path / "lam")
    assert not model.generative
    assert model.config.target.size == 4 * 4 * 24
    frames = torch.randint(0, 256, (1, 3, 3, 32, 32), dtype=torch.uint8)
    assert model.encode(frames).vectors.shape == (1, 2, 1, 4)
    with pytest.raises(UserError, match="no forward dynamics of pixels"):
        model.predict(frames, torch.zeros(1, 1, 4))
