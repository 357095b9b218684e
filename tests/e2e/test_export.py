"""`latentact export`: robot actions for video without any, in four formats that their own readers open."""

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image
from test_kill import killed

from conftest import TINY_LAM, TINY_POLICY, cli, contents, ok, refused
from latentact.data.cache import DataConfig, open_store
from latentact.data.lerobot.writer import EpisodeBuffer, RecordSpec, stage_episode, write_dataset
from latentact.types import ActionSpace

CAMERA, SIZE, STEPS, EPISODES = "observation.images.top", 32, 10, 12
pytestmark = pytest.mark.slow
SHORT = ("training.steps=20", "training.checkpoint_every=20", "training.eval_every=0")


def write_moves(folder: Path, episodes: int = EPISODES) -> Path:
    """Write a LeRobot dataset of a block that moves by its action, in pixels."""
    spec = RecordSpec(
        fps=10,
        camera=CAMERA,
        height=SIZE,
        width=SIZE,
        action_space=ActionSpace(kind="continuous", size=2),
        action_names=("x", "y"),
        state_names=("x", "y"),
        robot_type="toy",
    )
    rng, staged = np.random.default_rng(0), []
    for number in range(episodes):
        action = rng.integers(-3, 4, (STEPS, 2)).astype(np.float32)
        state = np.clip(12 + np.cumsum(np.vstack([np.zeros((1, 2)), action[:-1]]), 0), 0, SIZE - 8)
        frames = np.full((STEPS, SIZE, SIZE, 3), 30, np.uint8)
        for frame, (x, y) in zip(frames, state.astype(int), strict=True):
            frame[y : y + 8, x : x + 8] = (250, 200, 60)
        staged.append(folder / f"{number}.npz")
        stage_episode(
            staged[-1],
            spec,
            EpisodeBuffer(
                frames=frames,
                state=state.astype(np.float32),
                action=action,
                reward=np.zeros(STEPS, np.float32),
                success=np.zeros(STEPS, bool),
                task=f"push {number % 2}",
            ),
        )
    write_dataset(folder / "moves", spec, staged, sidecars={})
    return folder / "moves"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a LAM, its labels and a latent policy."""
    folder = tmp_path_factory.mktemp("export")
    data = write_moves(folder)
    ok("train-lam", *TINY_LAM, *SHORT, f"data.path={data}", f"out={folder / 'lam'}")
    ok("label", "--lam", folder / "lam", "--data", data, "--out", folder / "labels")
    ok("train-policy", *TINY_POLICY, *SHORT, f"labels={folder / 'labels'}", f"out={folder / 'policy'}")
    return folder


def command(world: Path, out: Path, *more: Any) -> tuple[Any, ...]:
    given = ("--policy", world / "policy", "--labels", world / "labels", "--out", out)
    return ("export", *given, "--labeled-episodes", "4", "--steps", "50", "--max-uncertainty", "3", *more)


@pytest.fixture(scope="module")
def exported(world: Path) -> Path:
    done = ok(*command(world, world / "lerobot"))
    assert "coverage" in done.stdout
    return world / "lerobot"


def test_a_lerobot_dataset_with_intervals_and_trust(world: Path, exported: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.utils.feature_utils import dataset_to_policy_features

    read, data = (LeRobotDataset("a/b", root=exported), LeRobotDataset("a/b", root=world / "moves"))
    assert set(dataset_to_policy_features(read.meta.features)) == {
        *("action", CAMERA, "observation.state"),
    }
    assert read.num_frames == data.num_frames == EPISODES * STEPS
    about = json.loads((exported / "export.json").read_text())
    trusted = 0
    for row in range(read.num_frames):
        mine, theirs = read[row], data[row]
        assert torch.equal(mine[CAMERA], theirs[CAMERA])
        assert mine["task"] == theirs["task"]
        assert (mine["pseudo.low"] <= mine["action"]).all()
        assert (mine["action"] <= mine["pseudo.high"]).all()
        trusted += bool(mine["pseudo.trusted"])
        if row % STEPS == STEPS - 1:
            assert not mine["pseudo.trusted"]
            assert torch.equal(mine["action"], read[row - 1]["action"])
    assert trusted == about["trusted_frames"]
    assert (about["frames"], about["labeled_steps"]) == (EPISODES * (STEPS - 1), 4 * (STEPS - 1))
    assert about["calibration_steps"] == about["labeled_steps"]
    assert read.meta.features["action"]["names"] == ["x", "y"]
    assert about["spec"]["weights"] == json.loads((world / "lam/spec.json").read_text())["weights"]
    assert 0 <= about["held_out"]["coverage"] <= 1
    assert "observation.state" in read.meta.stats


def test_only_actions_of_named_episodes_are_read(world: Path, exported: Path, tmp_path: Path) -> None:
    """Other actions of the data change nothing but the evaluation."""
    from latentact.data.splits import choose_labeled, split_episodes

    train, _ = split_episodes(
        open_store(DataConfig(path=str(world / "moves"), resolution=SIZE)), held_out=0.1, seed=0
    )
    labeled = set(choose_labeled(train, 4, 0).tolist())
    (file,) = (world / "moves/data").rglob("*.parquet")
    shutil.copy(file, tmp_path / "kept.parquet")
    table = pq.read_table(file)
    actions = [
        action if episode in labeled else [9.0, 9.0]
        for action, episode in zip(
            *(table[name].to_pylist() for name in ("action", "episode_index")), strict=True
        )
    ]
    place = table.column_names.index("action")
    try:
        pq.write_table(
            table.set_column(
                place, table.schema.field(place), pa.array(actions, table.schema.field(place).type)
            ),
            file,
        )
        ok(*command(world, tmp_path / "again"))
    finally:
        shutil.copy(tmp_path / "kept.parquet", file)
    columns = ["action", "pseudo.low", "pseudo.uncertainty"]
    mine, theirs = (
        pq.read_table(next((folder / "data").rglob("*.parquet")), columns=columns)
        for folder in (tmp_path / "again", exported)
    )
    assert mine.equals(theirs)


def test_robomimic_reads_it(world: Path, exported: Path, tmp_path: Path) -> None:
    ok(*command(world, tmp_path / "out", "--format", "robomimic"))
    store = open_store(DataConfig(path=str(world / "moves"), resolution=SIZE))
    with h5py.File(tmp_path / "out/demo.hdf5") as file:
        data = file["data"]
        assert json.loads(data.attrs["env_args"])["env_name"] == "moves"
        assert len(data) == EPISODES
        assert data.attrs["total"] == sum(demo.attrs["num_samples"] for demo in data.values())
        for number in range(EPISODES):
            demo, begin = data[f"demo_{number}"], number * STEPS
            n = demo.attrs["num_samples"]
            assert n == STEPS - 1
            assert demo["actions"].shape == (n, 2)
            assert demo["dones"][:].tolist() == [0] * (n - 1) + [1]
            assert demo["rewards"].shape == (n,)
            assert np.array_equal(demo["obs/image"][:], store.frames[begin : begin + n])
            assert np.array_equal(demo["next_obs/image"][:], store.frames[begin + 1 : begin + n + 1])
            assert np.array_equal(demo["obs/state"][1:], demo["next_obs/state"][:-1])
            assert demo["trusted"].dtype == bool
            assert (demo["low"][:] <= demo["high"][:]).all()
        assert "trusted" in file["mask"]


def test_diffusion_policy_reads_it(world: Path, tmp_path: Path) -> None:
    ok(*command(world, tmp_path / "out", "--format", "zarr", "--resolution", "16"))
    root: Any = zarr.open_group(tmp_path / "out/replay_buffer.zarr", mode="r")
    assert root.metadata.zarr_format == 2
    ends = root["meta/episode_ends"][:]
    assert ends.dtype == np.int64
    assert ends.tolist() == [(STEPS - 1) * (n + 1) for n in range(EPISODES)]
    store = open_store(DataConfig(path=str(world / "moves"), resolution=16))
    rows = np.flatnonzero(np.arange(EPISODES * STEPS) % STEPS != STEPS - 1)
    assert np.array_equal(root["data/img"][:], store.frames[rows])
    assert np.array_equal(root["data/state"][:], store.state[rows])
    assert all(
        root["data"][name].shape[0] == ends[-1] for name in ("action", "uncertainty", "trusted", "low")
    )


def test_lapa_reads_it(world: Path, tmp_path: Path) -> None:
    ok(*command(world, tmp_path / "out", "--format", "lapa-jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out/data.jsonl").read_text().splitlines()]
    assert len(lines) == EPISODES * (STEPS - 1)
    store = open_store(DataConfig(path=str(world / "moves"), resolution=SIZE))
    edges = json.loads((tmp_path / "out/bins.json").read_text())
    for number, line in enumerate(lines):
        episode, step = divmod(number, STEPS - 1)
        assert line["fields"] == "[instruction],[vision],action"
        assert f"`push {episode % 2}`" in line["instruction"]
        picture = np.array(Image.open(tmp_path / "out" / line["image"]))
        assert np.array_equal(picture, store.frames[episode * STEPS + step])
        for bins, number, chosen in zip(edges, line["raw_actions"], line["action"], strict=True):
            assert bins[chosen] <= number <= bins[chosen + 1]
    assert {*lines[0]} >= {"id", "uncertainty", "trusted", "low", "high"}


def test_only_trusted_frames_are_kept(world: Path, exported: Path, tmp_path: Path) -> None:

    table = pq.read_table(next((exported / "data").rglob("*.parquet"))).to_pydict()
    limit = str(np.median([u for u in table["pseudo.uncertainty"] if np.isfinite(u)]))
    ok(*command(world, tmp_path / "out", "--max-uncertainty", limit, "--only-trusted"))
    kept = pq.read_table(next((tmp_path / "out/data").rglob("*.parquet"))).to_pydict()
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert sum(kept["pseudo.trusted"]) == about["trusted_frames"] < about["frames"]
    assert len(kept["action"]) - sum(kept["pseudo.trusted"]) == len(set(kept["episode_index"]))


def test_video_gets_actions_from_labeled_data(world: Path, tmp_path: Path) -> None:
    """A folder of videos without anything else; a LeRobot dataset of the same LAM is labeled."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from latentact.data.lerobot.writer import _encode_video

    store = open_store(DataConfig(path=str(world / "moves"), resolution=SIZE))
    for number in range(2):
        rows = slice(number * STEPS, (number + 1) * STEPS)
        frames = store.frames[rows].repeat(4, 1).repeat(4, 2)
        (tmp_path / "videos").mkdir(exist_ok=True)
        _encode_video(tmp_path / f"videos/{number}.mp4", frames, 10)
    ok("label", "--lam", world / "lam", "--data", tmp_path / "videos", "--out", tmp_path / "labels")
    given = ("export", "--policy", world / "policy", "--labels", tmp_path / "labels", "--steps", "50")
    assert "has no robot actions to learn from" in refused(*given, "--out", tmp_path / "out")
    more = ("--calibration", world / "labels", "--labeled-episodes", "4", "--max-uncertainty", "3")
    ok(*given, *more, "--out", tmp_path / "out")
    read = LeRobotDataset("a/b", root=tmp_path / "out", video_backend="pyav")
    assert (read.num_episodes, read.num_frames) == (2, 2 * STEPS)
    assert read.meta.features["action"]["names"] == ["x", "y"]
    assert next((tmp_path / "out/videos").rglob("*.mp4")).stat().st_nlink == 2


def test_classes_of_an_inverse_dynamics_model(world: Path, blocks: Path, tmp_path: Path) -> None:
    tiny = ("lam=idm", "lam.backbone=patch", "lam.size=32", "lam.patch=4", "lam.channels=[16]")
    ok(
        "train-lam",
        *tiny,
        "data.resolution=32",
        "training.batch_size=16",
        *SHORT,
        "labeled_episodes=2",
        f"data.path={blocks}",
        f"out={tmp_path / 'idm'}",
    )
    ok("label", "--lam", tmp_path / "idm", "--data", blocks, "--out", tmp_path / "labels")
    given = ("export", "--labels", tmp_path / "labels", "--out", tmp_path / "out", "--labeled-episodes", "2")
    assert "--calibration-episodes must be at least 1" in refused(*given)
    more = ("--calibration-episodes", "3", "--max-uncertainty", "1")
    assert "must be a LeRobot dataset or a folder of videos" in refused(*given, *more)
    assert "must have continuous actions, got 4 classes" in refused(*given, *more, "--format", "robomimic")
    assert "need no policy" in refused(*given, *more, "--policy", world / "policy")
    ok(*given, *more, "--format", "lapa-jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out/data.jsonl").read_text().splitlines()]
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert about["calibration_steps"] == 3 * 11
    for line in lines:
        assert line["action"] == line["raw_actions"]
        assert len(line["set"]) == 4
        assert 0 <= line["uncertainty"] <= 0.76


def test_again_is_finished_and_a_failure_leaves_nothing(
    world: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    assert "already finished" in ok(*command(world, exported)).stderr
    assert before == {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    assert "got other files or settings" in refused(*command(world, exported, "--level", "0.8"))

    def full(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("latentact.stages.export.verify_dataset", full)
        assert cli(*command(world, tmp_path / "out")).returncode == 130
    assert not list(tmp_path.iterdir())


def test_another_plan_in_the_same_file_is_noticed(world: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    ok("plan", "--labels", world / "labels", "--budget", "8", "--out", plan)
    given = command(world, out, "--plan", plan, "--format", "lapa-jsonl")
    ok(*given)
    assert "already finished" in ok(*given).stderr
    content = json.loads(plan.read_text())
    plan.write_text(json.dumps(content | {"episodes": content["episodes"][::-1]}))
    assert "got other files or settings" in refused(*given)


def test_a_killed_export_leaves_nothing_and_the_next_one_writes_all(
    world: Path, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut/out"
    killed(command(world, out), lambda: [*out.parent.glob(".out.*.partial/*")], 0, out)
    ok(*command(world, out))
    whole, cut = contents(exported), contents(out)
    assert cut.keys() == whole.keys()
    changed = {name for name in whole if cut[name] != whole[name] and not name.endswith(".mp4")}
    assert changed == {"export.json"}  # which names the folder
    assert [*out.parent.iterdir()] == [out]


def test_a_missing_extra_is_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name in ("h5py", "zarr"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for kind, name in (("robomimic", "h5py"), ("zarr", "zarr")):
        said = refused(*command(world, tmp_path / "out", "--format", kind))
        assert said == f"error: '{name}' is not installed; install it with: pip install 'latentact[export]'."
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_sentence(world: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    ok(
        "train-lam",
        *TINY_LAM,
        *SHORT,
        "training.seed=7",
        f"data.path={world / 'moves'}",
        f"out={other / 'lam'}",
    )
    ok("label", "--lam", other / "lam", "--data", world / "moves", "--out", other / "labels")
    ok(
        "train-policy",
        *TINY_POLICY,
        *SHORT,
        "policy=bc",
        f"data.path={world / 'moves'}",
        "data.resolution=32",
        f"out={other / 'bc'}",
    )
    given = ("export", "--labels", world / "labels", "--out", out)
    assert "--policy must be a latent policy, got none" in refused(*given)
    assert "must be a latent policy, got one of robot actions" in refused(*given, "--policy", other / "bc")
    said = refused("export", "--labels", other / "labels", "--policy", world / "policy", "--out", out)
    assert "the policy" in said
    assert "the labels" in said
    assert "--calibration" in refused(*command(world, out, "--calibration", other / "labels"))
    assert "labeled-episodes must be between 2" in refused(*command(world, out, "--labeled-episodes", "1"))
    assert "labeled episodes must be between" in refused(*command(world, out, "--labeled-episodes", "40"))
    assert "no frame of" in refused(*command(world, out, "--max-uncertainty", "0", "--only-trusted"))
    assert "too few for intervals" in refused(*command(world, out, "--level", "0.99"))
    assert "--format must be lerobot, robomimic, zarr or lapa-jsonl" in refused(
        *command(world, out, "--format", "hdf5")
    )
    assert not out.exists()
