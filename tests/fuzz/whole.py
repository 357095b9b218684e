"""Valid tiny artifacts of every kind, which the fuzz tests damage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY_LAM, TINY_POLICY, cli, write_blocks
from latentact.io.video_writer import write_video

SEED = int(os.environ.get("LATENTACT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("LATENTACT_FUZZ_CASES", "80"))
"""Number of cases of both tests together."""
CODES = (
    *("lam.bottleneck.kind=vq", "lam.bottleneck.dim=4", "lam.bottleneck.positions=2"),
    "lam.bottleneck.codebook_size=4",
)
LAM = (*(word for word in TINY_LAM if "bottleneck" not in word), *CODES, "training.steps=2")
SHORT = ("--episodes", "1", "--max-steps", "2", "--record", "0", "--out")
EXTRACT = ("imitate", "--mode", "extract_only", "--lam-resolution", "32", "--video-path")
POLICY = (*TINY_POLICY, "training.steps=2")


def make_whole(root: Path) -> Path:
    """Write one valid tiny artifact of each kind into a folder."""
    blocks = write_blocks(root / "blocks.npz", episodes=4, steps=8)
    arrays = dict(np.load(blocks))
    arrays["action"][1] = 6  # as many classes as BabyAI has
    np.savez(blocks, allow_pickle=False, **arrays)
    (root / "videos").mkdir()
    for name in ("a", "b"):
        write_video(root / f"videos/{name}.mp4", arrays["obs"][:8], 10)
    lam, labels = f"{root}/lam", f"labels={root}/labels"
    tokens = ("precompute", "--lam-model-path", lam, "--output-dir")
    for command in (
        ("train-lam", f"data.path={blocks}", *LAM, f"out={lam}"),
        ("label", "--lam", lam, "--data", blocks, "--out", root / "labels"),
        ("train-policy", *POLICY, labels, f"out={root}/policy"),
        ("train-policy", *POLICY, labels, "policy=guided", f"out={root}/guided"),
        (
            "ground",
            f"policy={root}/policy",
            labels,
            "labeled_episodes=2",
            "training.steps=2",
            f"out={root}/ground",
        ),
        (*tokens, root / "tokens", "--dataset-root", blocks, "--output", "file"),
        (*tokens, root / "column", "--dataset-root", root / "videos"),
        (
            "rollout",
            "--policy",
            root / "ground",
            "--env",
            "babyai/GoToLocal",
            *SHORT,
            root / "report/rollout",
        ),
        (*EXTRACT, root / "videos/a.mp4", "--lam-model-path", lam, "--output-dir", root / "guide"),
    ):
        done = cli(*command)
        assert done.returncode == 0, done.stderr
    (root / "report").mkdir(exist_ok=True)
    for name in ("lam.json", "lam.npz", "metrics.csv", "config.yaml"):
        shutil.copyfile(root / "lam" / name, root / "report" / name)
    (root / "report/demo.json").write_text('{"wall_s": 3.5}\n')
    (root / "report/comparison.json").write_text(COMPARISON)
    for run in ("lam", "policy", "guided", "ground"):
        shutil.rmtree(root / run / "tensorboard")
        shutil.copytree(root / run, root / f"{run}_run")
        shutil.rmtree(root / run / "checkpoints")
    shutil.copytree(os.environ["LATENTACT_CACHE"], root / "cache")
    return root


COMPARISON = """{"env": "babyai/GoToLocal", "distract": "", "rows": [
  {"method": "latent", "k": 5, "seed": 0, "episodes": 2, "success": 0.5, "return": 0.4, "ci95": [0.1, 0.9],
   "return_ci95": [0.0, 0.8], "successes": [1, 0], "run": "x",
   "decoder_only": {"success": 0.5, "return": 0.4, "ci95": [0.1, 0.9]}},
  {"method": "bc_k", "k": 5, "seed": 0, "episodes": 2, "success": 0.0, "return": 0.0, "ci95": [0.0, 0.6],
   "return_ci95": [0.0, 0.0], "successes": [0, 0], "run": "y"}]}
"""


@pytest.fixture(scope="session", name="whole")
def whole_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one of each artifact."""
    return make_whole(tmp_path_factory.mktemp("whole"))
