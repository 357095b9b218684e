"""Cost of LAM tokens in a training step of `lam_diffusion`: none, precomputed, and computed on the fly.

Three policies with the same host network are stepped in turn on the same rows, so that a machine whose speed
drifts treats all alike; ratios are medians over these turns. Memory is the peak (Linux) of a process of its
own after the same few steps, with an allocator that gives back what is free; the three take turns here, too.

    python benchmarks/token_step.py [--batch-size 8] [--steps 40] [--memory-runs 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.factory import make_dataset
from lerobot.policies import make_policy, make_policy_config, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from torch.utils.data import default_collate

from latentact.data.lerobot.writer import EpisodeBuffer, RecordSpec, stage_episode, write_dataset
from latentact.types import ActionSpace

KINDS = ("unconditioned", "precomputed", "on the fly")
CAMERA, EPISODES, LENGTH, SIZE = "observation.images.top", 4, 60, 96
SMALL = {
    **{"pretrained_backbone_weights": None, "down_dims": (32, 64, 128), "horizon": 16, "n_action_steps": 8},
    **{"device": "cpu", "push_to_hub": False},
}

STEADY = {
    **{"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    **{"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
}
"""Environment in which the peak varies by some 2 MB; glibc's thresholds, which adapt, make it 40 MB."""
MEMORY_STEPS = 6


class Trainee:
    """A policy with its data and optimizer, stepped and timed as lerobot-train does."""

    def __init__(self, kind: str, folder: Path) -> None:
        changes: dict[str, Any] = {
            "unconditioned": {"use_lam_conditioning": False},
            "precomputed": {},
            "on the fly": {"use_precomputed_lam_tokens": False, "lam_model_path": str(folder / "lam")},
        }[kind]
        shape = {"lam_num_learned_tokens": 8, "lam_action_latent_dim": 16, "lam_use_vq_tokens": False}
        config: Any = make_policy_config("lam_diffusion", **SMALL, **shape, **changes)
        data = DatasetConfig("local/tokens", root=str(folder / "tokens"), video_backend="pyav")
        self.data = cast("Any", make_dataset(TrainPipelineConfig(dataset=data, policy=config)))
        torch.manual_seed(0)
        self.policy = make_policy(config, ds_meta=self.data.meta).train()
        self.before, _ = make_pre_post_processors(config, dataset_stats=self.data.meta.stats)
        self.optimizer = config.get_optimizer_preset().build(self.policy.get_optim_params())
        self.loading: list[float] = []
        self.seconds: list[float] = []

    def step(self, rows: list[int]) -> None:
        """Read the rows, then run one training step on them."""
        begun = time.perf_counter()
        batch = default_collate([self.data[row] for row in rows])
        loaded = time.perf_counter()
        batch[CAMERA] = batch[CAMERA].float() / 255
        loss, _ = self.policy.forward(self.before(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        self.loading.append(loaded - begun)
        self.seconds.append(time.perf_counter() - loaded)


def write_data(folder: Path) -> None:
    """Write demonstrations of a moving square, a LAM of LAPO's published networks, and its tokens."""
    from latentact.lams.models.lapo import LapoConfig
    from latentact.stages.precompute import PrecomputeConfig, run

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
    rng, paths = np.random.default_rng(0), [folder / f"{i}.npz" for i in range(EPISODES)]
    for path in paths:
        place = (20 + np.cumsum(rng.normal(0, 2, (LENGTH, 2)), 0)).clip(0, SIZE - 16).astype(int)
        frames = np.full((LENGTH, SIZE, SIZE, 3), 40, np.uint8)
        for frame, (y, x) in zip(frames, place, strict=True):
            frame[y : y + 16, x : x + 16] = 220
        values = place.astype(np.float32)
        done = np.arange(LENGTH) == LENGTH - 1
        reward = done.astype(np.float32)
        episode = EpisodeBuffer(
            frames=frames, state=values, action=values, reward=reward, success=done, task="move"
        )
        stage_episode(path, spec, episode)
    write_dataset(folder / "plain", spec, paths, sidecars={})
    model = LapoConfig().build()
    model.spec = replace(model.spec, frame_gap=1, frame_gap_s=0.1, fps=10.0)
    model.save_pretrained(folder / "lam")
    run(
        PrecomputeConfig(
            lam_model_path=str(folder / "lam"),
            dataset_root=str(folder / "plain"),
            output_dir=str(folder / "tokens"),
        )
    )


def memory(kind: str, folder: Path, batch_size: int) -> float:
    """Return the MB that a process of its own needed for some steps."""
    command = [sys.executable, __file__, "--memory-of", kind, "--folder", str(folder)]
    command += ["--batch-size", str(batch_size)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **STEADY}
    )
    return float(done.stdout.split()[-1])


def print_memory(folder: Path, batch_size: int, runs: int) -> None:
    """Print each kind's median peak, and its difference from the unconditioned one's of the same turn."""
    used = [{kind: memory(kind, folder, batch_size) for kind in KINDS} for _ in range(runs)]
    for kind in KINDS:
        more = sorted(turn[kind] - turn["unconditioned"] for turn in used)
        peak = statistics.median(turn[kind] for turn in used)
        print(
            f"{kind:14s} {peak:7.1f} MB at most, {statistics.median(more):+.1f} MB "
            f"({more[0]:+.1f} to {more[-1]:+.1f}) beside unconditioned"
        )


def main() -> None:
    """Print times, their ratios and the difference in memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--memory-runs", type=int, default=3, help="processes per kind; 0: no memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    register_third_party_plugins()
    rng = np.random.default_rng(0)
    count = MEMORY_STEPS if args.memory_of else args.steps
    draws = [rng.integers(EPISODES * LENGTH, size=args.batch_size).tolist() for _ in range(count)]
    if args.memory_of:
        trainee = Trainee(args.memory_of, args.folder)
        for rows in draws:
            trainee.step(rows)
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in status if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 1024)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        trainees = {kind: Trainee(kind, folder) for kind in KINDS}
        for number, rows in enumerate(draws):
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                trainees[kind].step(rows)
        plain, warm = trainees["unconditioned"], 2 if args.steps > 2 else 0
        for kind, one in trainees.items():
            step, loading = (statistics.median(each[warm:]) for each in (one.seconds, one.loading))
            pairs = zip(one.seconds[warm:], plain.seconds[warm:], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"{kind:14s} {step * 1e3:7.1f} ms/step, ratio {ratio:.3f}; reading {loading * 1e3:6.1f} ms")
        if args.memory_runs:
            print_memory(folder, args.batch_size, args.memory_runs)


if __name__ == "__main__":
    main()
