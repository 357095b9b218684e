import numpy as np
import pytest
import torch

from conftest import write_blocks
from latentact import TokenStream, camera_deltas
from latentact.data.cache import DataConfig
from latentact.data.stream import FrameStream
from latentact.errors import UserError
from latentact.labeling.dataset import EncodeOptions, encode_dataset
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.vq_ema import VqEmaConfig

CAMERA, FPS, GAP = "observation.images.top", 10, 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    bottleneck = VqEmaConfig(dim=16, codebooks=2, positions=2)
    small = {"size": 32, "patch": 4, "idm_channels": (16,), "fdm_channels": (16,)}
    return LapoConfig(backbone="patch", bottleneck=bottleneck, **small).build().eval()


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    data = write_blocks(tmp_path_factory.mktemp("data") / "blocks.npz", episodes=3, steps=9)
    return FrameStream(DataConfig(path=str(data), resolution=32))


def streamed(stream, deltas, as_float=True):
    """The items as lerobot's stream yields them, in disorder."""
    items = []
    for episode, chunks in stream.episodes([0, 1, 2]):
        frames = torch.from_numpy(np.concatenate([chunk.frames for chunk in chunks])).permute(0, 3, 1, 2)
        for frame in range(len(frames)):
            wanted = torch.tensor([frame + round(t * FPS) for t in deltas])
            window = frames[wanted.clamp(0, len(frames) - 1)]
            items.append(
                {
                    "episode_index": torch.tensor(episode),
                    "frame_index": torch.tensor(frame),
                    CAMERA: window.float() / 255 if as_float else window,
                    f"{CAMERA}_is_pad": (wanted < 0) | (wanted >= len(frames)),
                }
            )
    np.random.default_rng(0).shuffle(items)
    return items


@pytest.mark.parametrize("as_float", [True, False])
def test_a_stream_has_the_numbers_of_the_whole(as_float, model, stream, tmp_path, monkeypatch):
    deltas = camera_deltas(model, GAP / FPS, observed=(-0.1, 0.0))
    assert deltas == [-0.2, -0.1, 0.0, 0.2]
    whole = encode_dataset(model, stream, GAP, EncodeOptions(cache_dir=str(tmp_path / "whole")))
    clips, encode_clips = [], model.encode
    monkeypatch.setattr(model, "encode", lambda *a, **k: clips.append(len(a[0])) or encode_clips(*a, **k))
    stream = TokenStream(
        streamed(stream, deltas, as_float),
        model,
        camera=CAMERA,
        gap_s=GAP / FPS,
        name="blocks",
        kind="vq",
        observed=(-0.1, 0.0),
        batch_size=5,
        cache_dir=str(tmp_path),
    )
    for _ in range(2):
        items = list(stream)
        assert len(items) == 27
        for item in items:
            row = 9 * int(item["episode_index"]) + int(item["frame_index"])
            assert bool(item["observation.lam_valid"]) == bool(whole.valid[row])
            assert np.allclose(item["observation.lam_tokens"], whole.vectors[row].ravel(), atol=1e-5)
            assert np.array_equal(item["observation.lam_codes"], whole.codes[row])
            assert item[CAMERA].shape == (2, 3, 32, 32)
            assert item[f"{CAMERA}_is_pad"].tolist() == [item["frame_index"] == 0, False]
    assert sum(clips) == whole.valid.sum() == 3 * (9 - GAP)  # the second time nothing is encoded


def test_items_without_the_frames_are_one_sentence(model, stream, tmp_path):
    items = streamed(stream, [0.0])
    stream = TokenStream(items, model, camera=CAMERA, gap_s=0.2, name="x", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"must have 3 frames, got .*Give the dataset the delta_timestamps"):
        list(stream)
