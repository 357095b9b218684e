import logging
import tracemalloc
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from latentact.data.cache import DataConfig, open_store
from latentact.data.latents import read_arrays, read_labels, write_arrays
from latentact.data.stream import FrameStream
from latentact.errors import UserError
from latentact.io.arrays import load_npy
from latentact.io.tensors import require_array
from latentact.labeling import precision
from latentact.labeling.dataset import EncodeOptions, encode_dataset
from latentact.labeling.units import ProcessRank, units_of
from latentact.lams.contract import LatentActionModel
from latentact.lams.models.laq import LaqConfig
from latentact.lams.models.villa_x import VillaXConfig
from latentact.progress import Progress, duration
from latentact.stages import label
from latentact.types import LatentActions, LatentActionSpec


class Corner(LatentActionModel):
    """A "LAM" whose token is the mean of each of the three frames that it sees."""

    context = 1
    spec = LatentActionSpec(
        model="corner",
        tokens=3,
        token_dim=1,
        codebook_size=None,
        frame_gap=1,
        frame_gap_s=0.1,
        fps=10.0,
        resolution=0,
        camera="",
        weights="w",
    )

    def __init__(self):
        super().__init__(None)
        self.batches = []

    def encode(self, frames, valid=None, last=False, states=None):
        self.batches.append(len(frames))
        seen = frames.float().mean((2, 3, 4))[:, None, :, None]
        return LatentActions(
            vectors=-seen, continuous=seen, codes=None, valid=valid[:, -2:-1] & valid[:, -1:]
        )

    def predict(self, frames, vectors):
        raise AssertionError("encoding predicts nothing")

    def loss(self, clip):
        raise AssertionError("encoding learns nothing")


@pytest.fixture
def numbered(tmp_path):
    """Episodes of 3, 9, 1 and 4 frames, whose pixels count on."""
    lengths = (3, 9, 1, 4)
    frames = np.arange(sum(lengths), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    done = np.zeros(len(frames), bool)
    done[np.cumsum(lengths) - 1] = True
    np.savez(tmp_path / "numbered.npz", obs=frames, done=done, fps=10)
    return FrameStream(
        DataConfig(path=str(tmp_path / "numbered.npz"), resolution=0, cache_dir=str(tmp_path / "c"))
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("gap", [1, 2])
def test_windows_by_hand(gap, batch_size, numbered, tmp_path):
    options = EncodeOptions(batch_size=batch_size, cache_dir=str(tmp_path))
    found = encode_dataset(Corner(), numbered, gap, options)
    ends, first = np.repeat([3, 12, 13, 17], [3, 9, 1, 4]), np.repeat([0, 3, 12, 13], [3, 9, 1, 4])
    rows = np.arange(17)
    assert np.array_equal(found.valid, rows + gap < ends)
    wanted = np.stack([np.maximum(rows - gap, first), rows, rows + gap], 1)
    wanted[~found.valid] = 0
    assert found.continuous[:, :, 0].tolist() == wanted.tolist()
    assert found.vectors[:, :, 0].tolist() == (-wanted).tolist()
    assert found.codes is None
    assert found.frame_indices.tolist() == [*range(3), *range(9), *range(1), *range(4)]
    assert found.spec.frame_gap_s == pytest.approx(gap / 10)


class Stretched(Corner):
    """Looks at four frames at once; its token tells the clip's first frame, the current and the next one."""

    transitions_per_window = 3

    def encode(self, frames, valid=None, last=False, states=None):
        self.batches.append(len(frames))
        assert frames.shape[1] == 4
        seen = frames.float().mean((2, 3, 4))
        tokens = torch.stack([seen[:, :1].expand(-1, 3), seen[:, :-1], seen[:, 1:]], 2)[..., None]
        return LatentActions(
            vectors=-tokens, continuous=tokens, codes=None, valid=valid[:, :-1] & valid[:, 1:]
        )


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("gap", [1, 2])
def test_clips_of_several_transitions_by_hand(gap, batch_size, numbered, tmp_path):
    options = EncodeOptions(batch_size=batch_size, cache_dir=str(tmp_path))
    model = Stretched()
    found = encode_dataset(model, numbered, gap, options)
    rows, first = np.arange(17), np.repeat([0, 3, 12, 13], [3, 9, 1, 4])
    valid = rows + gap < np.repeat([3, 12, 13, 17], [3, 9, 1, 4])
    assert np.array_equal(found.valid, valid)
    since = rows - first
    clip = first + since % gap + since // gap // 3 * 3 * gap
    wanted = np.stack([clip, rows, rows + gap], 1)
    wanted[~valid] = 0
    assert found.continuous[:, :, 0].tolist() == wanted.tolist()
    assert sum(model.batches) == len({(a, b) for a, b in zip(first[valid], clip[valid], strict=True)})


def test_settings_that_change_the_numbers_have_tokens_of_their_own(numbered, tmp_path):
    options = EncodeOptions(cache_dir=str(tmp_path))
    narrow, wide = Corner(), Corner()
    wide.config = {"precision": "bf16"}
    encode_dataset(narrow, numbered, 1, options)
    encode_dataset(wide, numbered, 1, options)
    assert wide.batches, "computed, not taken from the other's tokens"


class Coarse(Corner):
    """Says other codes in bf16 than in fp32 for a shard of the transitions."""

    def __init__(self, every):
        super().__init__()
        self.every, self.narrow = every, 0
        self.spec = replace(Corner.spec, codebook_size=2)

    def encode(self, frames, valid=None, last=False, states=None):
        narrow = torch.is_autocast_enabled("cpu")
        self.narrow += narrow
        codes = torch.zeros(1, frames.shape[-4] - 1, 3, dtype=torch.long)
        if last:
            codes = codes.expand(len(frames), -1, -1)[:, -1:]
        elif narrow:
            codes[0, self.every :: self.every, 0] = 1
        tokens = codes[..., None].float()
        return LatentActions(vectors=tokens, continuous=tokens, codes=codes, valid=codes[..., 0] >= 0)


@pytest.mark.parametrize(
    ("every", "native", "chosen"),
    [
        (100, ["bf16"], "bf16"),
        (2, ["bf16"], "fp32"),
        (100, [], "fp32"),
        (100, ["int8", "bf16"], "int8"),
        (2, ["int8", "bf16"], "fp32"),
    ],
)
def test_auto_takes_the_fastest_that_is_native_and_keeps_the_codes(
    every, native, chosen, tmp_path, monkeypatch, caplog
):
    np.savez(tmp_path / "video.npz", obs=np.zeros((40, 2, 2, 3), np.uint8), done=np.arange(40) == 39, fps=10)
    monkeypatch.setattr(precision, "supports_bf16", lambda device: "bf16" in native)
    monkeypatch.setattr(precision, "supports_int8", lambda device: "int8" in native)
    made = []
    monkeypatch.setattr(precision, "int8", lambda model: made.append(model) or model)
    data = FrameStream(
        DataConfig(path=str(tmp_path / "video.npz"), resolution=0, cache_dir=str(tmp_path / "c"))
    )
    model = Coarse(every)
    with caplog.at_level(logging.INFO):
        found = encode_dataset(model, data, 1, EncodeOptions(cache_dir=str(tmp_path), precision="auto"))
    assert found.precision == chosen
    tried = native if chosen == "fp32" else native[:1]
    used = 2 * (chosen != "fp32")
    assert model.narrow == len(tried) + used, "tried once, then used for both batches or for none"
    assert len(made) == ("int8" in tried) + (chosen == "int8")
    assert (f"{chosen} preserves 100.0 % of the codes of 32 transitions" in caplog.text) == bool(used)
    assert f"computing in {chosen}" in caplog.text


def test_precision_is_part_of_what_was_computed(numbered, tmp_path):
    narrow, wide = Corner(), Corner()
    encode_dataset(wide, numbered, 1, EncodeOptions(cache_dir=str(tmp_path)))
    encode_dataset(narrow, numbered, 1, EncodeOptions(cache_dir=str(tmp_path), precision="bf16"))
    assert narrow.batches
    with pytest.raises(UserError, match=r"--precision must be .*bf16.*, got 'bf1'"):
        EncodeOptions(precision="bf1")
    with pytest.raises(UserError, match="--precision must not be int8 on this cuda"):
        EncodeOptions(precision="int8", device="cuda")


def test_frames_of_the_cache_give_the_same(numbered, tmp_path):
    one = encode_dataset(Corner(), numbered, 1, EncodeOptions(cache_dir=str(tmp_path / "one")))
    open_store(DataConfig(path=str(numbered.path), resolution=0, cache_dir=str(tmp_path / "c")))
    two = encode_dataset(Corner(), numbered, 1, EncodeOptions(cache_dir=str(tmp_path / "two")))
    assert np.array_equal(one.continuous, two.continuous)
    assert np.array_equal(one.frame_indices, two.frame_indices)


def test_short_episodes_share_a_batch_and_shards_are_units():
    assert units_of([3, 9, 1, 4], [], 8) == [[0], [1], [2, 3]]
    assert units_of([3, 3, 3], [], 8) == [[0, 1], [2]]
    assert units_of([3, 3, 3, 3], [(0, 3), (3, 4)], 8) == [[0, 1, 2], [3]]


def test_what_is_there_is_not_computed_again(numbered, tmp_path):
    options = EncodeOptions(cache_dir=str(tmp_path), batch_size=4)
    first, second, third = Corner(), Corner(), Corner()
    encode_dataset(first, numbered, 1, options)
    encode_dataset(second, numbered, 1, options)
    again = EncodeOptions(cache_dir=str(tmp_path), batch_size=4, overwrite=True)
    encode_dataset(third, numbered, 1, again)
    assert second.batches == []
    assert sorted(third.batches) == sorted(first.batches) == [2, 3, 4, 4]
    assert not [*(tmp_path / "tokens").glob("*.partial")]


def test_shares_are_joined_by_the_first(numbered, tmp_path):
    whole = encode_dataset(
        Corner(), numbered, 1, EncodeOptions(cache_dir=str(tmp_path / "whole"), batch_size=4)
    )
    shards = [ProcessRank(rank=rank, world_size=2) for rank in (1, 0)]
    found = [
        encode_dataset(
            Corner(), numbered, 1, EncodeOptions(cache_dir=str(tmp_path / "cut"), batch_size=4, process=s)
        )
        for s in shards
    ]
    assert found[0] is None
    assert np.array_equal(found[1].continuous, whole.continuous)


def test_shares_that_contradict_each_other(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK must be between 0 and WORLD_SIZE - 1"):
        ProcessRank.from_environment()


def test_a_damaged_video_has_no_tokens_and_harms_no_other(tmp_path):
    for number, length in enumerate((40, 40, 40)):
        with av.open(str(tmp_path / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", 10)
            stream.width = stream.height = 64
            for i in range(length):
                picture = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())
    data = (tmp_path / "1.mp4").read_bytes()
    half = len(data) // 2
    (tmp_path / "1.mp4").write_bytes(data[:half] + bytes(5000) + data[half + 5000 :])
    stream = FrameStream(DataConfig(path=str(tmp_path), resolution=0, cache_dir=str(tmp_path / "c")))
    found = encode_dataset(Corner(), stream, 1, EncodeOptions(cache_dir=str(tmp_path / "d"), batch_size=16))
    alone = FrameStream(DataConfig(path=str(tmp_path / "2.mp4"), resolution=0, cache_dir=str(tmp_path / "c")))
    last = encode_dataset(Corner(), alone, 1, EncodeOptions(cache_dir=str(tmp_path / "e"), batch_size=16))
    assert np.array_equal(found.continuous[-40:], last.continuous)
    if found.unreadable:  # else the decoder conceals the damage
        assert found.episodes.tolist() == [0, 2]


VILLA = VillaXConfig(
    resolution=28, d_t=4, encoder_depth=1, encoder_embed_dim=32, encoder_n_heads=2, map_heads=2, decoder=False
)
LAQ = LaqConfig(size=32, patch=4, dim=16, heads=2, head_dim=8, spatial_depth=1, temporal_depth=1, compat=True)


@pytest.mark.parametrize(("config", "kernel"), [(VILLA, "float"), (LAQ, "pillow")])
def test_labels_of_frames_of_any_size_are_what_a_published_model_says_of_them(config, kernel, tmp_path):
    torch.manual_seed(0)
    model = config.build().eval()
    model.spec = replace(model.spec, resize=kernel)
    model.save_pretrained(tmp_path / "lam")
    done = np.arange(12) == 11
    frames = np.random.default_rng(0).integers(256, size=(12, 45, 70, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", obs=frames, done=done)
    size, cache = model.spec.resolution, tmp_path / "cache"
    data = DataConfig(path=str(tmp_path / "data.npz"), cache_dir=str(cache))
    lam, out = str(tmp_path / "lam"), str(tmp_path / "out")
    label.run(label.LabelConfig(lam=lam, data=data, out=out))
    assert {path.name for path in cache.iterdir()} == {"memo", "tokens"}  # no frame was kept
    labels, store = read_labels(tmp_path / "out")
    with torch.inference_mode():
        said = model.encode(torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert store.frames.shape == (12, size, size, 3)
    assert np.allclose(labels.continuous[:-1], said.continuous[0], atol=1e-6)
    assert np.array_equal(labels.codes[:-1], said.codes[0])


def test_threads_do_not_change_the_last_bit(blocks, tmp_path):
    from latentact.lams.models.lapo import LapoConfig

    torch.manual_seed(0)
    model = (
        LapoConfig(backbone="patch", size=32, patch=4, idm_channels=(16,), fdm_channels=(16,)).build().eval()
    )
    stream, before, found = (
        FrameStream(DataConfig(path=str(blocks), resolution=32)),
        torch.get_num_threads(),
        [],
    )
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            options = EncodeOptions(cache_dir=str(tmp_path / str(threads)), batch_size=7)
            found.append(np.array(encode_dataset(model, stream, 1, options).continuous))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1])


def test_too_short_episodes_are_one_sentence(numbered, tmp_path):
    with pytest.raises(UserError, match=r"must have at least 10 frames for a window .*, got 9"):
        encode_dataset(Corner(), numbered, 9, EncodeOptions(cache_dir=str(tmp_path)))


def test_progress_off_a_terminal_says_rate_and_time_left(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("latentact.progress.time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with Progress("walking", 20, "steps") as slow:
        for _ in range(3):
            now[0] += 8
            slow.advance(1)
    with Progress("running", 10_000, "steps", done=1000) as fast:
        now[0] += 11
        fast.advance(550)
    assert [record.message for record in caplog.records] == [
        "walking: 2 of 20 steps (8.0 s for each, 2 min 24 s left)",
        "walking: 3 steps (8.0 s for each)",
        "running: 1550 of 10000 steps (50 steps/s, 2 min 49 s left)",
        "running: 1550 steps (50 steps/s)",
    ]
    assert duration(7500.0) == "2 h 5 min"


def test_large_files_are_written_and_read_without_a_copy_in_memory(tmp_path):
    file, shape = tmp_path / "vectors.npy", (8 << 20, 1, 1)  # 32 MiB
    np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape).flush()
    tracemalloc.start()
    write_arrays(tmp_path / "labels.safetensors", {"vectors": load_npy(file, "")}, None)
    arrays, _ = read_arrays(tmp_path / "labels.safetensors")
    require_array(file, "vectors", arrays["vectors"], shape, ("float32",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    arrays["vectors"][-1] = np.nan
    with pytest.raises(UserError, match="finite"):
        require_array(file, "vectors", arrays["vectors"], shape, ("float32",))
