import numpy as np
import pytest
import torch

from conftest import write_blocks
from latentact import TokenStream, camera_deltas
from latentact.data.cache import DataConfig
from latentact.data.lerobot.streaming import with_right_frames
from latentact.data.stream import FrameStream
from latentact.errors import UserError
from latentact.labeling.dataset import EncodeOptions, encode_dataset
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.vq_ema import VqEmaConfig
from wild import lerobot

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


def _torchcodec() -> bool:
    """Return whether torchcodec loads: LeRobot decodes streams with it, and it needs FFmpeg's libraries."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


needs_torchcodec = pytest.mark.skipif(not _torchcodec(), reason="torchcodec does not load")


@needs_torchcodec
@pytest.mark.parametrize("split", [False, True])
def test_a_stream_of_lerobot_has_the_frames_of_its_dataset(split, tmp_path):
    """Also the last frames of an episode and of a file, and files after the first."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset

    root = lerobot(tmp_path / "data", 3, lengths=(8, 6, 7), split=split)
    deltas = {CAMERA: [-0.2, 0.0, 0.1, 0.3], "observation.state": [0.0, 0.1]}
    right = LeRobotDataset("local/x", root=root, delta_timestamps=deltas, video_backend="torchcodec")
    rows = []
    for item in with_right_frames(StreamingLeRobotDataset("local/x", root=root, delta_timestamps=deltas)):
        expected = right[int(item["index"])]
        rows.append(int(item["index"]))
        for key in (CAMERA, f"{CAMERA}_is_pad", "observation.state", "observation.state_is_pad"):
            assert torch.equal(item[key], expected[key]), (key, rows[-1])
    assert sorted(rows) == list(range(21))


@needs_torchcodec
def test_tokens_of_a_stream_of_lerobot_end_with_the_episode(model, tmp_path):
    root = lerobot(tmp_path / "data", 3, lengths=(8, 6))
    whole = encode_dataset(
        model,
        FrameStream(DataConfig(path=str(root), resolution=32)),
        GAP,
        EncodeOptions(cache_dir=str(tmp_path)),
    )
    from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset

    items = StreamingLeRobotDataset(
        "local/x", root=root, delta_timestamps={CAMERA: camera_deltas(model, GAP / FPS)}
    )
    tokens = TokenStream(items, model, camera=CAMERA, gap_s=GAP / FPS, name="x", cache_dir=str(tmp_path))
    found = {int(item["index"]): item for item in tokens}
    assert [bool(found[row]["observation.lam_valid"]) for row in range(14)] == whole.valid.tolist()
    for row in np.flatnonzero(whole.valid):  # two decoders: gray levels differ by one
        assert np.allclose(found[row]["observation.lam_tokens"], whole.continuous[row].ravel(), atol=0.05)
