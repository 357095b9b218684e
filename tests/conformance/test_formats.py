"""What every registered format must do. A new format adds a maker below."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentact import check_format
from latentact.data.cache import DataConfig
from latentact.data.digest import Memo
from latentact.data.format import FORMATS, open_source
from latentact.data.lerobot.source import LeRobotSource
from latentact.errors import UserError
from latentact.stages import shard
from latentact.types import ActionSpace

LENGTHS = (12, 7, 9)
SIZE = 96


@dataclass
class Made:
    """A dataset on disk: episode e has LENGTHS[e] frames, frame i of it has the shade `shade(e, i)`."""

    path: Path
    camera: str = ""
    fps: float = 10.0
    tasks: tuple[str, ...] = ("", "", "")
    action_space: ActionSpace | None = None
    action_names: tuple[str, ...] = ()
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    tolerance: float = 3.0


def shade(episode: int, frame: int) -> int:
    return 20 + episode * 60 + frame * 4


def solid_frame(episode: int, frame: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), shade(episode, frame), np.uint8)


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def make_video_folder(path: Path) -> Made:
    for episode, name in enumerate(("a.mp4", "b/a.mkv", "b/c.mov")):
        write_video(path / name, [solid_frame(episode, i) for i in range(LENGTHS[episode])])
    (path / "metadata.csv").write_text("file_name,task\nb/a.mkv,push the tee\n")
    return Made(path, tasks=("", "push the tee", ""))


def make_npz(path: Path) -> Made:
    path.mkdir(parents=True)
    total = sum(LENGTHS[:2])
    done = np.zeros(total, bool)
    done[[LENGTHS[0] - 1, total - 1]] = True
    obs = np.stack([solid_frame(e, i) for e in (0, 1) for i in range(LENGTHS[e])])
    action = np.arange(total) % 4
    np.savez(path / "0.npz", obs=obs, ta=action, done=done, fps=10.0)
    last = np.stack([solid_frame(2, i) for i in range(LENGTHS[2])])
    np.savez(path / "1.npz", obs=last, action=np.zeros(len(last), int), fps=10.0)
    column = np.concatenate([action, np.zeros(len(last), int)])
    space = ActionSpace(kind="discrete", size=4)
    return Made(path, action_space=space, columns={"action": column}, tolerance=0.0)


def numbers(episode: int, frame: int) -> np.ndarray:
    return np.array([episode, frame], np.float32)


def make_lerobot_v2(path: Path) -> Made:
    names = ["dx", "dy"]
    features = {
        "observation.images.front": {
            "dtype": "video",
            "shape": [SIZE, SIZE, 3],
            "names": ["height", "width", "channel"],
        },
        "observation.state": {"dtype": "float32", "shape": [2], "names": [names]},
        "action": {"dtype": "float32", "shape": [2], "names": [names]},
    }
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "chunks_size": 2,
        "features": features,
        "total_episodes": 5,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (path / "meta").mkdir(parents=True)
    (path / "meta/info.json").write_text(json.dumps(info))
    lengths = {**dict.fromkeys(range(5), 9), **dict(zip((0, 1, 4), LENGTHS, strict=True))}
    listed = [{"episode_index": e, "tasks": [f"task {e}"], "length": lengths[e]} for e in range(5)]
    (path / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    rows = []
    for place, number in enumerate((0, 1, 4)):  # episodes 2 and 3 are listed and not there
        values = [numbers(place, i) for i in range(LENGTHS[place])]
        rows += values
        table = pa.table(
            {
                "observation.state": pa.array([v.tolist() for v in values], pa.list_(pa.float32(), 2)),
                "action": pa.array([(-v).tolist() for v in values], pa.list_(pa.float32(), 2)),
                "timestamp": pa.array([i / 10 for i in range(len(values))], pa.float32()),
                "episode_index": pa.array([number] * len(values), pa.int64()),
            }
        )
        name = f"chunk-{number // 2:03d}/{{}}episode_{number:06d}"
        file = path / "data" / f"{name.format('')}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
        video = path / "videos" / f"{name.format('observation.images.front/')}.mp4"
        write_video(video, [solid_frame(place, i) for i in range(LENGTHS[place])])
    state = np.stack(rows)
    return Made(
        path,
        camera="observation.images.front",
        tasks=("task 0", "task 1", "task 4"),
        action_space=ActionSpace(kind="continuous", size=2),
        action_names=("dx", "dy"),
        columns={"observation.state": state, "action": -state},
    )


def make_lerobot_v3(path: Path, *, video: bool = True) -> Made:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    camera, classes = "observation.images.top", ["left", "right", "forward"]
    features = {
        camera: {
            "dtype": "video" if video else "image",
            "shape": (SIZE, SIZE, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "int64", "shape": (1,), "names": {"classes": classes}},
    }
    dataset = LeRobotDataset.create("made/up", 10, features, root=path, use_videos=video)
    for episode, length in enumerate(LENGTHS):
        for i in range(length):
            frame = {camera: solid_frame(episode, i), "observation.state": numbers(episode, i)}
            dataset.add_frame({**frame, "action": np.array([i % 3]), "task": f"task {episode % 2}"})
        dataset.save_episode()
    dataset.finalize()
    return Made(
        path,
        camera=camera,
        tasks=("task 0", "task 1", "task 0"),
        action_space=ActionSpace(kind="discrete", size=3),
        action_names=tuple(classes),
        columns={
            "observation.state": np.stack([numbers(e, i) for e, n in enumerate(LENGTHS) for i in range(n)]),
            "action": np.concatenate([np.arange(n) % 3 for n in LENGTHS]),
        },
        tolerance=3.0 if video else 0.0,
    )


def make_lerobot_v3_images(path: Path) -> Made:
    return make_lerobot_v3(path, video=False)


def make_shards(path: Path) -> Made:
    """Our shards: small, so that there are several, with clips of 5 frames that the reader joins."""
    data = make_lerobot_v2(path.with_name("source"))
    config = DataConfig(path=str(data.path))
    shard.run(shard.ShardConfig(data=config, out=str(path), codec="png", shard_size_mb=0.04, clip_frames=5))
    assert len(list(path.glob("*.tar"))) == 2
    return replace(data, path=path)


def make_foreign_tars(path: Path) -> Made:
    """WebDataset tars of another program: an image per sample, and a json with the text."""
    webdataset = pytest.importorskip("webdataset")
    path.mkdir(parents=True)
    for tar, episodes in enumerate(((0, 1), (2,))):
        with webdataset.TarWriter(str(path / f"{tar:02d}.tar")) as writer:
            for e in episodes:
                for i in range(LENGTHS[e]):
                    about = {"caption": f"task {e}", "fps": 10}
                    writer.write({"__key__": f"{e}/frame{i}", "png": solid_frame(e, i), "json": about})
    return Made(path, tasks=("task 0", "task 1", "task 2"), tolerance=0.0)


MAKERS = {
    "lerobot_v2": [make_lerobot_v2],
    "lerobot_v3": [make_lerobot_v3, make_lerobot_v3_images],
    "npz": [make_npz],
    "shards": [make_shards, make_foreign_tars],
    "video_folder": [make_video_folder],
}
CASES = [
    pytest.param((name, maker), id=maker.__name__[5:]) for name, makers in MAKERS.items() for maker in makers
]


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory) -> tuple[str, Made]:
    pytest.importorskip("lerobot") if request.param[0] == "lerobot_v3" else None
    name, maker = request.param
    return name, maker(tmp_path_factory.mktemp("made") / "data")


@pytest.fixture(scope="module")
def source(made, tmp_path_factory):
    return open_source(made[1].path, "", Memo(tmp_path_factory.mktemp("memo"), made[1].path))


def test_every_format_is_checked_here():
    assert sorted(MAKERS) == FORMATS.names()


def test_one_format_claims_the_data(made):
    name, data = made
    assert [n for n in FORMATS.names() if FORMATS.get(n).detect(data.path)] == [name]


def test_what_is_known_without_decoding(made, source):
    data = made[1]
    assert tuple(episode.frames for episode in source.episodes) == LENGTHS
    assert tuple(episode.task for episode in source.episodes) == data.tasks
    assert len({episode.name for episode in source.episodes}) == 3
    assert len({episode.content for episode in source.episodes}) == 3
    assert all((data.path / episode.file).is_file() for episode in source.episodes)
    assert source.fps == pytest.approx(data.fps)
    assert (source.camera, source.action_space, source.action_names) == (
        data.camera,
        data.action_space,
        data.action_names,
    )
    assert not source.unreadable
    assert not source.uneven


def test_frames_and_times(made, source):
    for episode, length in enumerate(LENGTHS):
        times, frames = zip(*source.frames(episode), strict=True)
        np.testing.assert_allclose(times, np.arange(length) / 10, atol=1e-3)
        for i, frame in enumerate(frames):
            assert frame.shape == (SIZE, SIZE, 3)
            assert frame.dtype == np.uint8
            assert abs(frame.mean() - shade(episode, i)) <= made[1].tolerance


def test_columns_line_up_with_frames(made, source):
    for name, want in made[1].columns.items():
        got = source.column(name)
        rows = [first + i for first, n in zip(source.first_rows, LENGTHS, strict=True) for i in range(n)]
        np.testing.assert_array_equal(got[rows], want)
    assert source.column("no.such.column") is None


def test_the_contract(made):
    name, data = made
    check_format(FORMATS.get(name), data.path)


def test_a_copy_has_the_same_content(made, source, tmp_path):
    copy = shutil.copytree(made[1].path, tmp_path / "copy")
    other = open_source(copy, "", Memo(tmp_path / "memo", copy))
    assert [e.content for e in other.episodes] == [e.content for e in source.episodes]


def test_an_unknown_camera_is_one_sentence(made, tmp_path):
    with pytest.raises(UserError, match="wrist"):
        open_source(made[1].path, "wrist", Memo(tmp_path, made[1].path))


def test_missing_lerobot_episodes_are_reported_once(tmp_path):
    data = make_lerobot_v2(tmp_path / "data")
    source = open_source(data.path, "", Memo(tmp_path, data.path))
    assert isinstance(source, LeRobotSource)
    assert [episode.name for episode in source.episodes] == ["episode 0", "episode 1", "episode 4"]
    (note,) = source.notes
    assert note.startswith(
        "5 episodes are listed; using the 3 whose files are present, as there is no videos/"
    )


def test_an_extra_column_leaves_the_content_alone(tmp_path):
    pytest.importorskip("lerobot")
    data = make_lerobot_v3_images(tmp_path / "data")
    before = open_source(data.path, "", Memo(tmp_path, data.path))
    contents = [episode.content for episode in before.episodes]
    (file,) = data.path.glob("data/*/*.parquet")
    table = pq.read_table(file)
    pq.write_table(
        table.append_column("observation.extra", pa.array(range(len(table)))), file, row_group_size=5
    )
    after = open_source(data.path, "", Memo(tmp_path, data.path))
    assert [episode.content for episode in after.episodes] == contents
    np.testing.assert_array_equal(
        np.stack([frame[0, 0, 0] for _, frame in after.frames(1)]), [shade(1, i) for i in range(LENGTHS[1])]
    )


def test_several_cameras_must_be_chosen_from(tmp_path):
    data = make_lerobot_v2(tmp_path / "data")
    file = data.path / "meta/info.json"
    info = json.loads(file.read_text())
    info["features"]["observation.images.wrist"] = info["features"]["observation.images.front"]
    file.write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"2 cameras \(observation.images.front, observation.images.wrist\)"):
        open_source(data.path, "", Memo(tmp_path, data.path))
    assert open_source(data.path, "observation.images.front", Memo(tmp_path, data.path)).episodes


@pytest.mark.parametrize("content", ["", "readme"])
def test_nothing_to_read_is_one_sentence(tmp_path, content):
    if content:
        (tmp_path / "notes.txt").write_text(content)
    with pytest.raises(UserError, match=r"holds no data that can be read.*; give a LeRobot dataset"):
        open_source(tmp_path, "", Memo(tmp_path, tmp_path))


def test_a_missing_path_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "nowhere", "", Memo(tmp_path, tmp_path))


def test_an_incomplete_v3_dataset_never_reaches_for_the_network(tmp_path, monkeypatch):
    pytest.importorskip("lerobot")
    data = make_lerobot_v3_images(tmp_path / "data")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("network"))
    for missing in ("meta/episodes", "data"):
        copy = shutil.copytree(data.path, tmp_path / f"without_{Path(missing).stem}")
        gone = copy / missing
        gone.unlink() if gone.is_file() else shutil.rmtree(gone)
        with pytest.raises(UserError, match="copy the dataset again"):
            open_source(copy, "", Memo(tmp_path, copy))


def test_videos_of_different_rates_are_uneven_at_the_slowest(tmp_path):
    for name, rate in (("a.mp4", 10), ("b.mp4", 25)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.height = stream.width = SIZE
            for i in range(5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(solid_frame(0, i), format="rgb24")))
            container.mux(stream.encode())
    source = open_source(tmp_path, "", Memo(tmp_path / "memo", tmp_path))
    assert source.uneven
    assert source.fps == 10.0


def test_one_video_file_is_one_episode(tmp_path):
    write_video(tmp_path / "x.mp4", [solid_frame(0, i) for i in range(4)])
    write_video(tmp_path / "y.mp4", [solid_frame(0, i) for i in range(4)])
    source = open_source(tmp_path / "x.mp4", "", Memo(tmp_path / "memo", tmp_path))
    assert [(e.name, e.frames) for e in source.episodes] == [("x.mp4", 4)]


def test_grids_are_not_images(tmp_path):
    np.savez(tmp_path / "grid.npz", obs=np.zeros((4, 5, 5, 2), np.uint8))
    np.savez(tmp_path / "bad.npz", obs=np.zeros((4, 5, 5), np.float32))
    source = open_source(tmp_path, "", Memo(tmp_path / "memo", tmp_path))
    assert not source.resizable
    assert source.action_space is None
    assert source.unreadable == {"bad.npz": "`obs` must be uint8 [n, h, w, c], got float32 [4, 5, 5]"}


def test_npz_frames_with_channels_first_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", obs=np.zeros((4, 3, 32, 48), np.uint8))
    source = open_source(tmp_path / "a.npz", "", Memo(tmp_path, tmp_path / "a.npz"))
    assert source.unreadable == {
        "a.npz": "`obs` must be [n, h, w, c], got [4, 3, 32, 48], whose channels come first; transpose it"
    }
    assert source.column("observation.state") is None
