"""Training on LAM tokens from the command line: LeRobot's own, and `latentact train-with-tokens`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import cli
from latentact.training.lerobot.train import LeRobotTrainee
from toy_lerobot import GAP, SMALL, STEPS, TOKENS, write_demonstrations, write_lam

BATCH, EPOCH = 8, 2
"""Steps of an epoch of lam_diffusion: three episodes without their last 7 rows, in batches of 8."""
RUN = ("--batch-size", str(BATCH), "--num-epochs", "2")


def small(policy: str) -> list[str]:
    """Return the options that make a policy small."""
    settings = {**SMALL[policy.removeprefix("lam_")], "pretrained_backbone_weights": "null"}
    return [part for key, value in settings.items() for part in ("--policy-override", f"{key}={value}")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LAM, demonstrations, and the same with tokens as a column and as a file."""
    folder = tmp_path_factory.mktemp("plugin")
    plain, lam = write_demonstrations(folder), write_lam(folder / "lam")
    done = cli(
        *("precompute", "--lam-model-path", lam, "--dataset-root", plain),
        *("--output", "both", "--output-dir", folder / "tokens"),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """An undisturbed run of two epochs on the column."""
    out = world / "trained"
    done = train(world / "tokens", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "checkpoints/last/pretrained_model")
    return out


def train(root: Path, out: Path, *options: str | Path, policy: str = "lam_diffusion") -> Any:
    named = ("train-with-tokens", "--policy", policy, "--dataset-root", root, "--output-dir", out)
    return cli(*named, *RUN, *small(policy), *options)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of the newest checkpoint, but for paths of the run in its settings."""
    last = folder / "checkpoints" / "last"
    files = {str(path.relative_to(last)): path.read_bytes() for path in last.rglob("*") if path.is_file()}
    return {name: data.replace(str(folder).encode(), b"RUN") for name, data in files.items()}


def weights(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{epoch * EPOCH:06d}" / "pretrained_model/model.safetensors")


def test_every_epoch_leaves_a_checkpoint_of_lerobots_form(trained: Path) -> None:
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["000002", "000004", "last"]
    assert (trained / "checkpoints" / "last").resolve().name == "000004"
    config = json.loads((trained / "checkpoints/last/pretrained_model/config.json").read_text())
    assert (config["type"], config["lam_num_learned_tokens"], config["lam_action_latent_dim"]) == (
        *("lam_diffusion", 2, 4),
    )
    assert config["lam_weights"]
    rows = (trained / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows] == [["step", "epoch"], ["2", "1"], ["4", "2"]]
    moved = [k for k, v in weights(trained, 1).items() if not torch.equal(v, weights(trained, 2)[k])]
    assert any("lam_encoder" in name for name in moved)


def test_a_killed_run_goes_on_to_the_same_bytes(
    world: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = world / "killed", LeRobotTrainee.save

    def dies(self: Any, folder: Path, step: int) -> None:
        if step > EPOCH:
            raise KeyboardInterrupt
        save(self, folder, step)

    monkeypatch.setattr(LeRobotTrainee, "save", dies)
    assert train(world / "tokens", out).returncode == 130
    assert (out / "checkpoints" / "last").resolve().name == "000002"
    monkeypatch.undo()
    done = train(world / "tokens", out)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 2" in done.stderr
    mine, wanted = contents(out), contents(trained)
    assert mine.keys() == wanted.keys()
    assert [name for name in wanted if mine[name] != wanted[name]] == []
    assert "already finished" in train(world / "tokens", out).stderr


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_token_file_trains_the_same_policy(world: Path, trained: Path, suffix: str) -> None:
    out = world / f"file_{suffix}"
    done = train(
        world / "plain", out, "--lam-tokens-path", world / f"tokens/lam_tokens.{suffix}", "--num-epochs", "1"
    )
    assert done.returncode == 0, done.stderr
    found, wanted = weights(out, 1), weights(trained, 1)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-3)


def test_items_with_tokens_from_a_file_are_those_of_the_column(world: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from latentact.data.latents import read_token_file
    from latentact.data.lerobot.token_dataset import TokenDataset

    for deltas in ([-2, -1, 0, 1], None):
        times = (
            {TOKENS: [d / 10 for d in deltas], "observation.lam_valid": [d / 10 for d in deltas]}
            if deltas
            else None
        )
        column = LeRobotDataset("a/b", root=world / "tokens", delta_timestamps=times, video_backend="pyav")
        plain: Any = LeRobotDataset("a/b", root=world / "plain", video_backend="pyav")
        mine = TokenDataset(plain, read_token_file(world / "tokens"), TOKENS, deltas)
        for row in (0, 1, STEPS - 1, STEPS, 2 * STEPS - 2, 3 * STEPS - 1):
            wanted, item = column[row], mine[row]
            for key in (k for k in wanted if "lam_tokens" in k or "lam_valid" in k):
                assert torch.equal(item[key].float(), wanted[key].float()), (row, key)
        for key in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(
                mine.meta.stats[TOKENS][key], column.meta.stats[TOKENS][key], rtol=1e-4
            )


def test_lam_act_on_the_fly_trains_from_the_same_command(world: Path) -> None:
    options = ("use_precomputed_lam_tokens=false", f"lam_model_path={world / 'lam'}")
    done = train(
        world / "plain",
        world / "act",
        *("--num-epochs", "1", "--policy-override", options[0], "--policy-override", options[1]),
        *("--policy-override", "lam_num_learned_tokens=2", "--policy-override", "lam_action_latent_dim=4"),
        policy="lam_act",
    )
    assert done.returncode == 0, done.stderr
    saved = world / "act/checkpoints/last/pretrained_model"
    assert json.loads((saved / "config.json").read_text())["lam_frame_gap_s"] == GAP / 10


def lerobot_train(*options: str | Path) -> str:
    """Run LeRobot's command and return the modules of latentact that it has imported."""
    code = (
        "import sys; from lerobot.scripts.lerobot_train import main; main()\n"
        "print('modules', *(m for m in sys.modules if m.startswith('latentact')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.rpartition("modules ")[2]


def test_lerobot_train_is_the_same_training_and_resumes(
    world: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = world / "lerobot", {**SMALL["diffusion"], "pretrained_backbone_weights": "null"}
    modules = lerobot_train(
        *("--policy.type=lam_diffusion", "--policy.device=cpu", "--policy.push_to_hub=false"),
        *(f"--policy.{key}={value}" for key, value in settings.items()),
        *("--policy.lam_num_learned_tokens=2", "--policy.lam_action_latent_dim=4"),
        *("--dataset.repo_id=local/tokens", f"--dataset.root={world / 'tokens'}"),
        *("--dataset.video_backend=pyav", f"--batch_size={BATCH}", "--num_workers=0"),
        *("--steps=4", f"--save_freq={EPOCH}", "--env_eval_freq=0", f"--output_dir={out}"),
    )
    assert "latentact.nn.token_projection" in modules
    assert "latentact.lams" not in modules, "precomputed tokens need no LAM"
    for epoch in (1, 2):
        found, wanted = weights(out, epoch), weights(trained, epoch)
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    last = out / "checkpoints/last/pretrained_model/train_config.json"
    from lerobot.scripts.lerobot_train import main

    typed = ["lerobot-train", f"--config_path={last}", "--resume=true", "--steps=5"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with mock.patch.object(sys, "argv", typed), mock.patch("lerobot.scripts.lerobot_train.init_logging"):
        main()
    assert (out / "checkpoints/last").resolve().name == "000005"


# --- input that cannot be used


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--policy", "act"), "--policy must be lam_diffusion or lam_act, got 'act'"),
        (("--num-epochs", "0"), "--num-epochs must be between 1"),
        (("--policy-override", "lam_dropout"), "--policy-override must be KEY=VALUE"),
        (("--policy-override", "lam_dropuot=0.1"), "does not accept these settings"),
        (("--policy-override", "lam_dropout=2"), "must be at least 0 and less than 1"),
        (("--policy-override", "lam_dropout=some"), "lam_dropout"),
        (("--policy-override", "lam_num_learned_tokens=7"), "Set lam_num_learned_tokens=2"),
        (("--lam-tokens-path", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
        (("--dataset-root", "nowhere"), "nowhere is not a LeRobot dataset"),
    ],
)
def test_bad_options_are_one_sentence(world: Path, options: tuple[str, ...], said: str) -> None:
    done = train(world / "tokens", world / "bad", *options)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert not (world / "bad").exists()


def test_lerobot_train_says_what_is_wrong_with_a_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lerobot.scripts.lerobot_train import main

    given = ("--policy.type=lam_act", "--policy.push_to_hub=false", "--dataset.repo_id=a/b")
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *given, "--policy.lam_dropout=2"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.rstrip().endswith("lam_dropout must be at least 0 and less than 1, got 2.0.")
    assert "Traceback" not in said


def test_token_files_that_do_not_fit_are_one_sentence(world: Path, tmp_path: Path) -> None:
    whole = (world / "tokens/lam_tokens.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[:-100])
    (tmp_path / "truncated.pt").write_bytes((world / "tokens/lam_tokens.pt").read_bytes()[:-100])
    other = write_demonstrations(tmp_path, episodes=2, seed=1)
    (tmp_path / "alike").mkdir()
    alike = write_demonstrations(tmp_path / "alike", episodes=3, seed=1)
    bad = {
        "alike.safetensors": (alike, "got those of other frames"),
        "truncated.safetensors": (world / "plain", "is not a complete safetensors file"),
        "truncated.pt": (world / "plain", "truncated.pt is not a complete"),
        "other.safetensors": (other, f"rows of plain, got {3 * STEPS}"),
        "dtype.safetensors": (world / "plain", "of float32 or float16 [36, 2, 4], got float64"),
    }
    (tmp_path / "other.safetensors").write_bytes(whole)
    (tmp_path / "alike.safetensors").write_bytes(whole)
    tensors = load_file(world / "tokens/lam_tokens.safetensors")
    tensors["latent_actions"] = tensors["latent_actions"].double()
    save_file(tensors, tmp_path / "dtype.safetensors", metadata=_metadata(whole))
    for name, (root, said) in bad.items():
        done = train(root, tmp_path / "out", "--lam-tokens-path", tmp_path / name)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr.strip().splitlines()[-1]


def _metadata(whole: bytes) -> dict[str, str]:
    return json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
