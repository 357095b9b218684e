"""A data format of an outside package, one class, serves the commands that its source declares."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import cli, ok
from latentact import UserError, check_format
from latentact.data import check
from latentact.data.decode.video import decode
from latentact.data.digest import Memo, blake2b
from latentact.data.format import FORMATS, EpisodeMetadata, Source, choose_camera, open_source
from latentact.io.video_writer import write_video
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.none import WhitenedConfig
from latentact.types import ActionSpace

LENGTHS, SIZE, REASON = (12, 9), 240, "its video is gone"


class ClipsSource(Source):
    """Videos that a JSON file lists, each with a task and an action per frame."""

    camera, uneven, resizable = "top", False, True
    kind, scene_cuts, whole_videos = "list of clips", True, True
    action_space, action_names = ActionSpace(kind="continuous", size=2), ("x", "y")
    sizes = ((SIZE, SIZE),)

    def __init__(self, path: Path) -> None:
        index = json.loads(path.read_text())
        self.fps = index["fps"]
        self.unreadable, self.skipped, self.notes = {}, {}, []
        self.video_files = self._files = [path.parent / clip["video"] for clip in index["clips"]]
        self._actions = np.concatenate([np.array(clip["action"], np.float32) for clip in index["clips"]])
        self.tasks = [clip["task"] for clip in index["clips"]]
        self.episodes = [
            EpisodeMetadata(
                name=clip["video"],
                file=clip["video"],
                task=clip["task"],
                frames=len(clip["action"]),
                content=blake2b(file.read_bytes()),
            )
            for file, clip in zip(self.video_files, index["clips"], strict=True)
        ]
        lengths = [episode.frames for episode in self.episodes]
        self.first_rows = (np.cumsum(lengths) - lengths).tolist()

    def frames(self, number: int) -> Any:
        return decode(self._files[number])

    def column(self, name: str) -> Any:
        return self._actions if name == "action" else None

    def row_tasks(self, number: int) -> Any:
        return np.full(self.episodes[number].frames, number)


class Clips:
    """The format of `ClipsSource`."""

    @staticmethod
    def detect(path: Path) -> bool:
        return path.name == "clips.json"

    @staticmethod
    def open(path: Path, camera: str, memo: Memo) -> Source:
        return ClipsSource(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two videos of a moving block at 10 fps, and the JSON file that lists them, in a registered format."""
    folder = tmp_path_factory.mktemp("clips")
    index = []
    for number, length in enumerate(LENGTHS):
        frames = np.full((length, SIZE, SIZE, 3), 30, np.uint8)
        for step, frame in enumerate(frames):
            frame[80 : 80 + 60, 10 * step : 10 * step + 60] = (250, 200, 60)
        write_video(folder / f"{number}.mp4", frames, 10.0)
        action = [[float(step), float(number)] for step in range(length)]
        index.append({"video": f"{number}.mp4", "task": f"task {number}", "action": action})
    (folder / "clips.json").write_text(json.dumps({"fps": 10.0, "clips": index}))
    FORMATS.names()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS._items, "clips", Clips)
        yield folder / "clips.json"


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    """An untrained LAM with a token of 4 numbers and a gap of 0.1 s."""
    out = tmp_path_factory.mktemp("lam") / "lam"
    small = LapoConfig(size=32, backbone="patch", patch=4, idm_channels=(8,), fdm_channels=(8,))
    model = replace(small, bottleneck=WhitenedConfig(dim=4)).build()
    model.spec = replace(model.spec, frame_gap=1, frame_gap_s=0.1, fps=10.0, resolution=32)
    model.save_pretrained(out)
    return out


def test_the_format_keeps_the_contract(clips):
    check_format(Clips, clips)


def test_check_data_opens_its_videos_and_names_its_kind(clips):
    found, sheets = check.check_data(clips)
    assert found.usable
    assert found.kind == "list of clips"
    assert found.cameras == [
        {
            "key": "top",
            "files": 2,
            "codec": ["h264"],
            "pixel_format": ["yuv420p"],
            "matrix": ["unspecified"],
            "streams": ["1"],
            "size": ["240x240"],
            "rotated_or_mirrored": 0,
        }
    ]
    assert not any("LeRobot" in warning for warning in found.warnings)
    assert [sheet.camera for sheet in sheets] == ["top", "top"]


def test_check_data_checks_every_camera(clips, monkeypatch):
    def several(path, camera, memo):
        source = ClipsSource(path)
        source.camera = choose_camera(("left", "right"), camera, path)
        return source

    monkeypatch.setattr(Clips, "open", staticmethod(several))
    found, sheets = check.check_data(clips, max_frames=1)
    assert [camera["key"] for camera in found.cameras] == ["left", "right"]
    assert [sheet.camera for sheet in sheets] == ["left", "right"]
    assert found.episodes["count"] == 2


def test_precompute_adds_columns_to_its_videos_and_actions(clips, lam, tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    where = ("--dataset-root", clips, "--lam-model-path", lam)
    ok("precompute", *where, "--output-dir", tmp_path / "tokens")
    made = LeRobotDataset("made/up", root=tmp_path / "tokens", video_backend="pyav")
    assert made.meta.camera_keys == ["top"]
    assert made.meta.features["action"]["names"] == ["x", "y"]
    assert made.num_frames == sum(LENGTHS)
    expected = [
        [float(step), float(number)] for number, length in enumerate(LENGTHS) for step in range(length)
    ]
    assert np.array(made.hf_dataset["action"]).tolist() == expected
    assert made[15]["task"] == "task 1"
    assert np.asarray(made.hf_dataset["observation.lam_tokens"]).shape == (sum(LENGTHS), 4)
    ok("precompute", *where, "--output-dir", tmp_path / "actions", "--as", "action", "--state-size", "3")
    pretraining = LeRobotDataset("made/up", root=tmp_path / "actions", video_backend="pyav")
    assert pretraining.num_frames == sum(LENGTHS) - len(LENGTHS)
    assert pretraining.meta.features["action"]["shape"] == (4,)


def test_precompute_rejects_columns_that_do_not_fit_the_videos(clips, lam, tmp_path):
    index = json.loads(clips.read_text())
    for clip in index["clips"]:
        clip["video"] = str(clips.parent / clip["video"])
    index["clips"][0]["action"].append([0.0, 0.0])
    (tmp_path / "clips.json").write_text(json.dumps(index))
    where = ("--dataset-root", tmp_path / "clips.json", "--lam-model-path", lam)
    refused = cli("precompute", *where, "--output-dir", tmp_path / "tokens")
    assert refused.returncode == 2
    assert "must have a row of action for each of its 12 frames, got 13; use --output file" in refused.stderr
    assert not (tmp_path / "tokens").exists()


def test_shard_looks_for_scene_cuts(clips, tmp_path):
    ok("shard", "--data", clips, "--out", tmp_path / "shards")
    assert json.loads((tmp_path / "shards/manifest.json").read_text())["settings"]["cuts"] is True


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"whole_videos": True, "video_files": ()}, "must have a video file for each of 2 episodes, got 0"),
        ({"video_files": (Path("gone.mp4"),)}, r"video_files must exist, got \['gone.mp4'\]"),
        ({"groups": ((0, 1),)}, r"groups must cover the 2 episodes in order, got \[\(0, 1\)\]"),
        ({"damaged": {"0.mp4": REASON}}, r"damaged shards must also be unreadable, got \['0.mp4'\]"),
        ({"sizes": ((10, 10),)}, "sizes must have that of the frames, 240x240"),
        ({"numeric_columns": ("speed",)}, r"numeric_columns must be columns, got \['speed'\]"),
        ({"times": lambda number: np.zeros(LENGTHS[number])}, "times of 0.mp4 must be those of its frames"),
        ({"frame": lambda number, index: np.zeros((SIZE, SIZE, 3))}, "frame 11 of 0.mp4 must be the same"),
        ({"table_rows": lambda: (np.zeros(3), np.zeros(3))}, r"table_rows must have the 21 rows"),
        ({"column": lambda name: None}, "a source with an action_space must have the column action"),
    ],
)
def test_a_false_declaration_is_noticed(clips, monkeypatch, fault, message):
    def faulty(path, camera, memo):
        source = ClipsSource(path)
        for name, value in fault.items():
            setattr(source, name, value)
        return source

    monkeypatch.setattr(Clips, "open", staticmethod(faulty))
    with pytest.raises(UserError, match=message):
        check_format(Clips, clips)


def test_parts_that_lack_rows_are_noticed(clips, monkeypatch):
    parts = ClipsSource(clips).lerobot_parts()
    short = replace(
        parts, episode=lambda number: replace(parts.episode(number), columns=lambda: {"action": [0]})
    )
    monkeypatch.setattr(ClipsSource, "lerobot_parts", lambda self: short)
    with pytest.raises(UserError, match=r"of 0.mp4 must have a row per frame \(12\), got \{'action': 1\}"):
        check_format(Clips, clips)


def test_a_source_without_the_base_class_is_completed(clips, monkeypatch, tmp_path):
    """Formats of older packages match the attributes of `Source` without subclassing it."""
    members = {name: value for name, value in vars(ClipsSource).items() if not name.startswith("__dict")}
    alone = type("Alone", (), {k: v for k, v in members.items() if k not in ("scene_cuts", "whole_videos")})
    monkeypatch.setattr(Clips, "open", staticmethod(lambda path, camera, memo: alone(path)))
    with pytest.warns(DeprecationWarning, match="Alone must subclass latentact.data.format.Source"):
        source = open_source(clips, "", Memo(tmp_path, clips))
    assert (source.kind, source.groups, source.random_access) == ("list of clips", (), False)
    np.testing.assert_allclose(source.times(1), np.arange(9) / 10, atol=1e-3)
    assert source.frame(1, 3).shape == (SIZE, SIZE, 3)
    assert source.lerobot_parts() is None


def test_a_frozen_source_without_the_base_class_is_completed(clips, monkeypatch, tmp_path):
    @dataclass(frozen=True)
    class Frozen:
        camera: str

    monkeypatch.setattr(Clips, "open", staticmethod(lambda path, camera, memo: Frozen("top")))
    with pytest.warns(DeprecationWarning, match="Frozen must subclass"):
        source = open_source(clips, "", Memo(tmp_path, clips))
    assert (source.camera, source.scene_cuts) == ("top", False)


def test_tasks_of_parts_are_those_of_the_rows(clips):
    source = ClipsSource(clips)
    source.episodes = [replace(episode, task="") for episode in source.episodes]
    assert source.lerobot_parts().episode(1).tasks == ["task 1"]
