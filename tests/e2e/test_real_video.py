"""Real robot video, if available beside the repository: train a LAM on each dataset and label it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from conftest import cli

DATA = Path(__file__).parents[3] / "shared" / "data"
TINY = (
    *("lam.backbone=patch", "lam.size=32", "lam.patch=8", "lam.idm_channels=[8]", "lam.fdm_channels=[8]"),
    *("lam.bottleneck.kind=none", "lam.bottleneck.dim=4", "data.resolution=32"),
    *("training.steps=3", "training.batch_size=8", "training.eval_every=0", "probe_transitions=64"),
)
SETS = {
    "g1_pick_bottle_lerobot_v21": ("frame_gap_s=0.2",),
    "simpler_real_clips": ("frame_gap_s=0.4", "data.target_fps=5"),
    "real_robot_gifs": (),
    "vjepa2_franka": (),
    "simpler_real_clips/bridge_real_1.mp4": (),
}


def run(*words: str | Path) -> None:
    done = cli(*words)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_trains_and_labels(name: str, tmp_path: Path) -> None:
    if not (DATA / name).exists():
        pytest.skip("the real datasets are not beside the repository")
    lam, labels, data = tmp_path / "lam", tmp_path / "labels", DATA / name
    if (data / "meta").exists():  # one episode: missing episodes are allowed
        data = tmp_path / "one"
        shutil.copytree(DATA / name, data, ignore=shutil.ignore_patterns("*3[0-9].*"))
    run("train-lam", f"data.path={data}", f"out={lam}", *TINY, *SETS[name])
    fps = [word.partition("=")[2] for word in SETS[name] if word.startswith("data.target_fps")]
    more = ["--target-fps", fps[0]] if fps else []
    run("label", "--lam", lam, "--data", data, "--out", labels, *more)
    spec = json.loads((lam / "lam.json").read_text())["spec"]
    tokens = load_file(labels / "lam_tokens.safetensors")
    assert tokens["vectors"].shape[1:] == (spec["tokens"], spec["token_dim"])
    assert tokens["valid"].any()
    assert not tokens["vectors"][~tokens["valid"]].any()
