"""A LAM that uses robot states gets them from every caller, or the caller refuses in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from latentact import LatentActionExtractor, TokenStream, UserError, camera_deltas, load_lam
from latentact.io.video_writer import write_video
from latentact.labeling.frozen import FrozenLam
from latentact.lams.models.clam import ClamConfig
from latentact.lams.models.laom import LaomConfig
from latentact.quantizers.none import WhitenedConfig

CAMERA = "observation.images.top"
FRAMES, STEPS = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8), 9
STATES = torch.randn(9, 3)


@pytest.fixture(scope="module")
def lam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ClamConfig(
        observations="both",
        state_size=3,
        backbone="patch",
        size=32,
        idm_channels=(8,),
        fdm_channels=(8,),
        hidden=16,
        decoder=(16,),
    )
    folder = tmp_path_factory.mktemp("lam")
    config.build().eval().save_pretrained(folder / "clam")
    return folder / "clam"


@pytest.fixture(scope="module")
def expected(lam: Path) -> np.ndarray:
    """Latent actions of the 8 transitions."""
    with torch.inference_mode():
        return load_lam(lam).encode(FRAMES, states=STATES).continuous[0].numpy()


def test_a_guide_of_frames_and_states(lam: Path, expected: np.ndarray, tmp_path: Path) -> None:
    extractor, frames = LatentActionExtractor(lam, 0, "cpu"), FRAMES.permute(0, 2, 3, 1).numpy()
    guide = extractor.extract_from_frames(frames, states=STATES.numpy())
    np.testing.assert_allclose(guide.continuous, expected, atol=1e-5)
    assert guide.valid.all()
    with pytest.raises(UserError, match="must have the 3 values that the LAM clam uses, got none"):
        extractor.extract_from_frames(frames)
    with pytest.raises(UserError, match="states must have a row for each of 9 frames, got 8"):
        extractor.extract_from_frames(frames, states=STATES.numpy()[:8])
    write_video(tmp_path / "demo.mp4", frames, 10)
    with pytest.raises(UserError, match=r"observation.state of .*demo.mp4 must have the 3 values"):
        extractor.extract(tmp_path / "demo.mp4")


def test_tokens_on_the_fly(lam: Path, expected: np.ndarray) -> None:
    frozen = FrozenLam(str(lam))
    assert (frozen.state_size, frozen.offsets(1, 1)) == (3, [-2, -1, 0])
    tokens = frozen.tokens(FRAMES[None, :3], 1, quantized=False, states=STATES[None, :3])
    np.testing.assert_allclose(tokens[0, 0], expected[1].ravel(), atol=1e-5)
    with pytest.raises(UserError, match="must have the 3 values"):
        frozen.tokens(FRAMES[None, :3], 1, quantized=False)


def test_a_stream_of_frames_and_states(lam: Path, expected: np.ndarray, tmp_path: Path) -> None:
    model, items = load_lam(lam), []
    deltas = camera_deltas(model, 0.1)
    assert deltas == [-0.1, 0.0, 0.1]
    for frame in range(STEPS):
        rows = torch.tensor([frame - 1, frame, frame + 1])
        pad, rows = (rows < 0) | (rows >= STEPS), rows.clamp(0, STEPS - 1)
        items.append(
            {
                "episode_index": torch.tensor(0),
                "frame_index": torch.tensor(frame),
                CAMERA: FRAMES[rows],
                f"{CAMERA}_is_pad": pad,
                "observation.state": STATES[rows],
                "observation.state_is_pad": pad,
            }
        )
    options = {"camera": CAMERA, "gap_s": 0.1, "name": "x", "cache_dir": str(tmp_path)}
    found = [*TokenStream(items, model, **options)]
    for frame, item in enumerate(found):
        assert bool(item["observation.lam_valid"]) == (frame < STEPS - 1)
        assert torch.equal(item["observation.state"], STATES[frame])
        if frame < STEPS - 1:
            np.testing.assert_allclose(item["observation.lam_tokens"], expected[frame].ravel(), atol=1e-5)
    for item in items:
        item["observation.state"] = item["observation.state"][1]
    with pytest.raises(UserError, match=r"observation.state of an item must be \[3, 3\] .* got \[3\]"):
        next(iter(TokenStream(items, model, **{**options, "name": "y"})))


def test_weights_of_older_names_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = LaomConfig(
        size=32,
        backbone="patch",
        channels=(8,),
        image_channels=(8,),
        hidden=16,
        horizon=1,
        bottleneck=WhitenedConfig(dim=4),
    )
    model = config.build().eval()
    model.save_pretrained(tmp_path / "new")
    weights = load_file(tmp_path / "new/model.safetensors")
    old = {name.replace("pixel_decoder.", "pictures."): value for name, value in weights.items()}
    assert old.keys() != weights.keys()
    settings = (tmp_path / "new/config.json").read_text().replace("image_channels", "picture_channels")
    (tmp_path / "new").rename(tmp_path / "old")
    save_file(old, tmp_path / "old/model.safetensors")
    (tmp_path / "old/config.json").write_text(settings)
    loaded = load_lam(tmp_path / "old")
    assert torch.equal(loaded.encode(FRAMES).vectors, model.encode(FRAMES).vectors)
    wrapped = torch.nn.ModuleDict({"model": config.build()})  # as training does
    wrapped.load_state_dict({f"model.{name}": value for name, value in old.items()})
    assert torch.equal(
        wrapped["model"].pixel_decoder.state_dict()[next(iter(loaded.pixel_decoder.state_dict()))],
        next(iter(loaded.pixel_decoder.state_dict().values())),
    )
