import json

import numpy as np
import pytest

from latentact.data.lerobot.writer import (
    EpisodeBuffer,
    RecordSpec,
    number_statistics,
    pixel_statistics,
    stage_episode,
    write_dataset,
)
from latentact.types import ActionSpace


def spec(size=8, **changes):
    fields = {
        "fps": 10,
        "camera": "observation.images.top",
        "height": size,
        "width": size,
        "action_space": ActionSpace(kind="discrete", size=3),
        "action_names": ("left", "right", "stay"),
        "state_names": ("x", "y"),
        "robot_type": "toy",
    }
    return RecordSpec(**{**fields, **changes})


def episode(seed, n=5, size=8, action=None, task="go"):
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, size, dtype=np.uint8)
    frames = np.stack([np.broadcast_to(ramp[:, None, None] + 10 * i, (size, size, 3)) for i in range(n)])
    return EpisodeBuffer(
        frames=frames if size >= 96 else rng.integers(0, 256, (n, size, size, 3), np.uint8),
        state=rng.random((n, 2), np.float32),
        action=rng.integers(0, 3, n) if action is None else action,
        reward=rng.random(n, np.float32),
        success=np.arange(n) == n - 1,
        task=task,
    )


def written(folder, form, episodes):
    paths = [folder / f"{i}.npz" for i in range(len(episodes))]
    for path, item in zip(paths, episodes, strict=True):
        stage_episode(path, form, item)
    rows = write_dataset(folder / "data", form, paths, sidecars={"note.json": {"from": "a test"}})
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/data", root=folder / "data", video_backend="pyav")
    assert rows == len(dataset) == sum(len(item.frames) for item in episodes)
    return dataset


def test_small_frames_come_back_exactly(tmp_path):
    episodes = [episode(0, task="go"), episode(1, n=3, task="stop"), episode(2, n=4, task="go")]
    dataset = written(tmp_path, spec(), episodes)
    assert dataset.meta.features["observation.images.top"]["dtype"] == "image"
    assert dataset.meta.features["action"]["names"] == {"classes": ["left", "right", "stay"]}
    assert dataset.fps == 10
    row = 0
    for number, item in enumerate(episodes):
        for i in range(len(item.frames)):
            got = dataset[row]
            pixels = (got["observation.images.top"].permute(1, 2, 0) * 255).round().byte().numpy()
            assert (pixels == item.frames[i]).all()
            assert np.array_equal(got["observation.state"].numpy(), item.state[i])
            assert got["action"].item() == item.action[i]
            assert got["next.reward"].item() == item.reward[i]
            assert got["next.success"].item() == item.success[i]
            assert got["task"] == item.task
            assert got["episode_index"].item() == number
            assert got["frame_index"].item() == i
            assert got["index"].item() == row
            assert got["timestamp"].item() == pytest.approx(i / 10)
            row += 1
    assert json.loads((tmp_path / "data/meta/note.json").read_text()) == {"from": "a test"}
    assert not list(tmp_path.glob(".*"))


def test_large_frames_become_video_that_stays_in_step(tmp_path):
    actions = np.random.default_rng(0).random((5, 2), np.float32)
    form = spec(
        96, action_space=ActionSpace(kind="continuous", size=2), action_names=("x", "y"), state_names=()
    )
    episodes = [episode(0, size=96, action=actions), episode(1, n=3, size=96, action=actions[:3])]
    dataset = written(tmp_path, form, [EpisodeBuffer(**{**vars(e), "state": None}) for e in episodes])
    assert dataset.meta.features["observation.images.top"]["dtype"] == "video"
    assert "observation.state" not in dataset.meta.features
    row = 0
    for item in episodes:
        for i in range(len(item.frames)):
            got = dataset[row]
            error = got["observation.images.top"].permute(1, 2, 0).numpy() * 255 - item.frames[i]
            assert abs(error).mean() < 4  # frames differ by 10 from one to the next
            assert np.array_equal(got["action"].numpy(), item.action[i])
            row += 1
    videos = list((tmp_path / "data/videos").rglob("*.mp4"))
    assert len(videos) == 1
    assert videos[0].stat().st_mode & 0o777 == 0o644


def test_statistics_are_complete_and_right(tmp_path):
    episodes = [episode(0), episode(1, n=7)]
    stats = written(tmp_path, spec(), episodes).meta.stats
    state = np.concatenate([item.state for item in episodes])
    pixels = np.concatenate([item.frames for item in episodes]) / 255
    keys = {"observation.images.top", "observation.state", "action", "next.reward", "next.success"}
    assert keys | {"timestamp", "frame_index", "episode_index", "index", "task_index"} == set(stats)
    assert stats["observation.state"]["mean"] == pytest.approx(state.mean(0), abs=1e-6)
    assert stats["observation.state"]["std"] == pytest.approx(state.std(0), abs=1e-6)
    assert stats["observation.state"]["max"] == pytest.approx(state.max(0))
    assert stats["observation.images.top"]["mean"].shape == (3, 1, 1)
    assert stats["observation.images.top"]["mean"].ravel() == pytest.approx(pixels.mean((0, 1, 2)))
    assert stats["observation.images.top"]["std"].ravel() == pytest.approx(pixels.std((0, 1, 2)))
    assert stats["index"]["max"].item() == 11
    assert all(stats[key]["count"].item() == 12 for key in stats)


def test_pixel_statistics_by_hand():
    counts = np.zeros((3, 256), int)
    counts[:, 0], counts[:, 255] = 3, 1
    stats = pixel_statistics(counts, 1)
    assert stats["min"].ravel().tolist() == [0, 0, 0]
    assert stats["max"].ravel().tolist() == [1, 1, 1]
    assert stats["mean"].ravel() == pytest.approx([0.25] * 3)
    assert stats["std"].ravel() == pytest.approx([np.sqrt(0.1875)] * 3)
    assert [float(stats[q][0, 0, 0]) for q in ("q01", "q50", "q90")] == [0, 0, 1]


def test_number_statistics_by_hand():
    stats = number_statistics({"a": np.array([[1.0, 2], [3, 6]]), "index": np.array([4, 8])})
    assert stats["a"]["mean"].tolist() == [2, 4]
    assert stats["a"]["std"].tolist() == [1, 2]
    assert stats["index"]["q50"].tolist() == [6]
    assert stats["index"]["count"].tolist() == [2]


@pytest.mark.parametrize(("size", "lossless"), [(95, True), (96, False), (97, True), (128, False)])
def test_which_frames_are_kept_exactly(size, lossless):
    assert spec(size).lossless is lossless


def test_full_files_are_followed_by_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("lerobot.datasets.feature_utils.DEFAULT_DATA_FILE_SIZE_IN_MB", 0.001)
    episodes = [episode(i, n=4) for i in range(3)]
    dataset = written(tmp_path, spec(), episodes)
    assert len(list((tmp_path / "data/data").rglob("*.parquet"))) == 3
    assert dataset[11]["action"].item() == episodes[2].action[3]
