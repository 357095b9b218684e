"""LeRobot policies pretrain on latent actions: `precompute --as action`, `lerobot-train`, `adapt-policy`."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_lerobot_policy import lerobot_eval

from conftest import ok, refused
from latentact.data.latents import read_token_file
from toy_lerobot import CAMERA, GAP, SIZE, SMALL, STEPS, D, K, write_demonstrations, write_lam

VIDEO = "observation.images.video"
EPISODES = 3
pytestmark = pytest.mark.slow


def lerobot_train(root: Path, out: Path, *options: str, steps: int = 2) -> Path:
    """Run `lerobot-train` in this process and return the folder of the policy."""
    from lerobot.scripts.lerobot_train import main

    typed = [
        *(
            "lerobot-train",
            "--policy.device=cpu",
            "--policy.push_to_hub=false",
            "--dataset.repo_id=local/toy",
        ),
        *(f"--dataset.root={root}", "--dataset.video_backend=pyav", "--batch_size=4", f"--steps={steps}"),
        *(f"--save_freq={steps}", "--num_workers=0", "--env_eval_freq=0", f"--output_dir={out}", *options),
    ]
    with mock.patch.object(sys, "argv", typed), mock.patch("lerobot.scripts.lerobot_train.init_logging"):
        main()
    return out / "checkpoints/last/pretrained_model"


def small(kind: str) -> list[str]:
    settings = {"type": kind, **SMALL[kind], "pretrained_backbone_weights": "null"}
    return [f"--policy.{name}={value}" for name, value in settings.items()]


def opened(root: Path, **options: Any) -> Any:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/toy", root=root, video_backend="pyav", **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LAM of gap 2, labeled demonstrations, a folder of videos without anything else, and its tokens."""
    from latentact.data.lerobot.writer import _encode_video

    folder = tmp_path_factory.mktemp("any_policy")
    write_demonstrations(folder)
    lam = write_lam(folder / "lam")
    (folder / "videos").mkdir()
    rng = np.random.default_rng(1)
    for number in range(EPISODES):
        frames = rng.integers(0, 256, (STEPS + number, SIZE, SIZE, 3), np.uint8)
        _encode_video(folder / f"videos/{number}.mp4", frames, 10)
    given = ("--lam-model-path", lam, "--dataset-root", folder / "videos")
    ok("precompute", *given, "--output", "file", "--output-dir", folder / "tokens")
    ok("precompute", *given, "--as", "action", "--state-size", "2", "--output-dir", folder / "pretraining")
    return folder


@pytest.fixture(scope="module")
def act(world: Path) -> Path:
    """ACT pretrained on the latent actions of the videos."""
    return lerobot_train(world / "pretraining", world / "act", *small("act"))


@pytest.fixture(scope="module")
def adapted(world: Path, act: Path) -> Path:
    """The same for the robot of the demonstrations; the folder of the training names its last checkpoint."""
    ok("adapt-policy", "--policy", world / "act", "--data", world / "plain", "--out", world / "adapted")
    return world / "adapted"


def test_actions_are_the_tokens_and_no_chunk_has_a_wrong_one(world: Path) -> None:
    tokens = read_token_file(world / "tokens")
    read = opened(world / "pretraining", delta_timestamps={"action": [i / 10 for i in range(4)]})
    assert set(read.meta.features) >= {"action", "observation.state", VIDEO}
    assert not any("lam" in name for name in read.meta.features)
    assert read.meta.features["action"]["shape"] == (K * D,)
    assert [read.meta.episodes[n]["length"] for n in range(EPISODES)] == [
        STEPS - GAP + n for n in range(EPISODES)
    ]
    row = 0
    for episode in range(EPISODES):
        mine = tokens.tokens[(tokens.episode_index == episode) & tokens.valid]
        assert len(mine) == STEPS - GAP + episode
        for step in range(len(mine)):
            item = read[row]
            padded = item["action_is_pad"].numpy()
            assert padded.tolist() == [step + i >= len(mine) for i in range(4)]
            wanted = mine[step : step + 4]
            assert np.array_equal(item["action"].numpy()[~padded], wanted)
            assert item["observation.state"].tolist() == [0, 0]
            row += 1
    assert row == read.num_frames
    used = tokens.tokens[tokens.valid]
    np.testing.assert_allclose(read.meta.stats["action"]["mean"], used.mean(0), atol=1e-5)
    np.testing.assert_allclose(read.meta.stats["action"]["std"], used.std(0), atol=1e-5)
    about = json.loads((world / "pretraining/meta/lam_tokens.json").read_text())
    assert (about["asked"]["as"], about["spec"]["frame_gap"], about["dataset"]) == ("action", GAP, "videos")
    assert next((world / "pretraining/videos").rglob("*.mp4")).stat().st_nlink > 1
    card = ok("push", world / "pretraining", "owner/name", "--dry-run").stdout
    assert "`action` holds continuous tokens of `lapo`" in card


def test_a_lerobot_dataset_keeps_state_and_frames_and_loses_its_actions(world: Path, tmp_path: Path) -> None:
    """A v3 dataset whose episodes share a table; a row without a transition divides its episode."""
    gappy = tmp_path / "gappy"
    shutil.copytree(world / "plain", gappy)
    (table,) = (gappy / "data").rglob("*.parquet")
    rows = pq.read_table(table)
    places = zip(
        *(rows[key].to_pylist() for key in ("timestamp", "episode_index", "frame_index")), strict=True
    )
    late = [time + (0.5 if episode == 1 and frame >= 5 else 0) for time, episode, frame in places]
    place = rows.column_names.index("timestamp")
    pq.write_table(rows.set_column(place, "timestamp", pa.array(late, pa.float32())), table)
    plain, cut = opened(world / "plain"), tmp_path / "cut"
    ok(
        "precompute",
        "--lam-model-path",
        world / "lam",
        "--dataset-root",
        gappy,
        "--as",
        "action",
        "--output-dir",
        cut,
    )
    read = opened(cut)
    kept = [*range(10), *range(12, 15), *range(17, 22), *range(24, 34)]
    assert [read.meta.episodes[n]["length"] for n in range(4)] == [10, 3, 5, 10]
    for row, wanted in enumerate(kept):
        mine, theirs = read[row], plain[wanted]
        assert torch.equal(mine[CAMERA], theirs[CAMERA])
        assert torch.equal(mine["observation.state"], theirs["observation.state"])
        assert mine["action"].shape == (K * D,)


def test_an_adapted_policy_has_the_same_weights_but_those_of_action_size(
    world: Path, act: Path, adapted: Path
) -> None:
    about = json.loads((adapted / "adapted.json").read_text())
    assert about["action_size"] == [K * D, 2]
    assert set(about["initialized"]) == {
        *("model.action_head.weight", "model.action_head.bias", "model.vae_encoder_action_input_proj.weight"),
    }
    old, new = load_file(act / "model.safetensors"), load_file(adapted / "model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in new if name not in about["initialized"])
    config = json.loads((adapted / "config.json").read_text())
    assert set(config["input_features"]) == {CAMERA, "observation.state"}
    assert config["output_features"]["action"]["shape"] == [2]
    stats = load_file(next(adapted.glob("policy_postprocessor*unnormalizer*.safetensors")))
    assert torch.allclose(
        stats["action.mean"], torch.tensor(opened(world / "plain").meta.stats["action"]["mean"]).float()
    )


def test_lerobot_train_fine_tunes_it_and_rollout_plays_it(world: Path, adapted: Path) -> None:
    tuned = lerobot_train(world / "plain", world / "tuned", f"--policy.path={adapted}")
    assert load_file(tuned / "model.safetensors")["model.action_head.weight"].shape[0] == 2
    done = ok(
        "rollout",
        "--policy",
        world / "tuned",
        "--env",
        "pusht",
        "--episodes",
        "1",
        "--max-steps",
        "6",
        "--record",
        "0",
        "--out",
        world / "rollout",
    )
    assert "success" in done.stdout
    shown = ("--env.resolution=64", f"--env.camera={CAMERA}", "--env.max_steps=6")
    options = ("--eval.n_episodes=1", "--eval.batch_size=1")
    metrics = lerobot_eval(tuned, "pusht", world / "evaluated", *shown, *options)
    assert len(metrics["sum_rewards"]) == 1


def test_diffusion_too(world: Path) -> None:
    lerobot_train(world / "pretraining", world / "diffusion", *small("diffusion"))
    ok("adapt-policy", "--policy", world / "diffusion", "--data", world / "plain", "--out", world / "dp")
    new = json.loads((world / "dp/adapted.json").read_text())["initialized"]
    assert new
    assert all("unet" in name for name in new)
    assert not any("cond_encoder" in name for name in new)
    tuned = lerobot_train(world / "plain", world / "tuned_dp", f"--policy.path={world / 'dp'}", steps=1)
    assert (tuned / "model.safetensors").is_file()


def test_projections_of_equal_size_are_initialized_too(
    world: Path, act: Path, adapted: Path, tmp_path: Path
) -> None:
    """Two numbers of another meaning fit in shape; new weights are those of the seed."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ok(
            "adapt-policy",
            "--policy",
            adapted,
            "--data",
            world / "plain",
            "--seed",
            seed,
            "--out",
            tmp_path / name,
        )
    about = json.loads((tmp_path / "a/adapted.json").read_text())
    assert len(about["initialized"]) == 3
    a, b, c = (load_file(tmp_path / name / "model.safetensors")["model.action_head.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    again = ok(
        "adapt-policy", "--policy", adapted, "--data", world / "plain", "--seed", "1", "--out", tmp_path / "a"
    )
    assert "already finished" in again.stderr


def test_bad_input_is_one_sentence(world: Path, act: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    said = refused("adapt-policy", "--policy", world / "lam", "--data", world / "plain", *out)
    assert "must be a LeRobot policy" in said
    said = refused("adapt-policy", "--policy", act, "--data", world / "videos", *out)
    assert "must be a LeRobot v3 dataset" in said
    said = refused("adapt-policy", "--policy", act, "--data", tmp_path / "nowhere", *out)
    assert "must be a LeRobot v3 dataset, got no such folder" in said
    said = refused("adapt-policy", "--policy", tmp_path / "absent", "--data", world / "plain", *out)
    assert "absent" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    said = refused("adapt-policy", "--policy", act, "--data", world / "plain", "--out", tmp_path / "full")
    assert "got other files or settings" in said
    given = (
        "--lam-model-path",
        world / "lam",
        "--dataset-root",
        world / "videos",
        "--output-dir",
        tmp_path / "out",
    )
    assert "--output column" in refused("precompute", *given, "--as", "action", "--output", "file")
    assert "--as must be tokens or action, got 'actions'." in refused("precompute", *given, "--as", "actions")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
