"""Does pretraining on video pay for a stock policy? LeRobot's ACT with and without it: one table.

Run: python benchmarks/pretrain_act.py --out runs/pretrain_act    (re-run an interrupted command to resume it)

For each seed, the same ACT is trained by `lerobot-train` in four ways and rolled out on the same episodes:
- pretrained: on the latent actions of videos without actions and states, then on k labeled episodes;
- scratch: on the k labeled episodes with as many updates in total;
- scratch, short: on the k labeled episodes with the updates of the second stage alone;
- oracle: on all videos with their actions and states, with as many updates in total.
The seeds share the LAM and the pretrained ACT. Each has its own k labeled episodes, which are not among the
videos, and its own random numbers otherwise. The error is that of the first predicted action on further
episodes, relative to that of their mean action. On a core of a CPU, training takes about 0.3 s a step.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from latentact.agents.load import load_agent
from latentact.composition import load_experiment
from latentact.data.cache import DataConfig, open_store
from latentact.envs.spec import env_spec
from latentact.evaluation.policy.intervals import mean_interval, success_interval
from latentact.io.atomic import atomic_dir, atomic_write, read_object, write_json
from latentact.stages import adapt_policy, collect, precompute, rollout, train_lam

log = logging.getLogger("pretrain_act")

ROWS = {
    "pretrained": "ACT, pretrained on latent actions",
    "scratch": "ACT",
    "scratch_short": "ACT, second stage alone",
    "oracle": "ACT, all actions (oracle)",
}
LABELED, HELD_OUT, ROLLOUTS = 1_000_000, 2_000_000, 100_000
"""First reset seeds; those of the videos begin at 0."""
HELD_OUT_EPISODES = 20
LAM = (
    "experiment=pusht",
    "lam.patch=8",
    "lam.idm_channels=[64,128]",
    "lam.fdm_channels=[96]",
    "training.batch_size=32",
    "training.warmup_steps=100",
    "training.eval_every=0",
)
ACT = (
    "--policy.type=act",
    "--policy.pretrained_backbone_weights=null",
    "--policy.dim_model=128",
    "--policy.n_heads=4",
    "--policy.dim_feedforward=256",
    "--policy.n_encoder_layers=1",
    "--policy.use_vae=false",
    "--policy.chunk_size=16",
    "--policy.n_action_steps=8",
    "--policy.use_amp=true",
)


def main() -> None:
    """Make what is missing, then the table."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = Path(options.out)
    _refuse_other_settings(out / "settings.json", options)
    demonstrations = _collected(out / "data/demonstrations", options, options.videos, 0)
    held_out = _collected(out / "data/held_out", options, HELD_OUT_EPISODES, HELD_OUT)
    videos = without_labels(demonstrations, out / "data/videos")
    latent = latent_actions(videos, out, options)
    pretrained = out / "pretrained"
    if "pretrained" in options.rows:
        lerobot_train(
            latent, pretrained, options.pretrain_steps, 0, options, *ACT, *rates(options.pretrain_lr)
        )
    rows = []
    for seed in options.seeds:
        labeled = _collected(out / f"data/labeled{seed}", options, options.k, LABELED + 1000 * seed)
        for row in options.rows:
            log.info("--- %s, seed %d", row, seed)
            folder = out / f"seed{seed}" / row
            policy = trained(row, folder, demonstrations, labeled, pretrained, seed, options)
            rows.append({"row": row, "seed": seed, **scores(policy, folder, held_out, options)})
            write_json(out / "rows.json", rows)
    text = page(rows)
    with atomic_write(out / "pretrain_act.md") as partial:
        partial.write_text(text)
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="runs/pretrain_act", help="run folder")
    parser.add_argument("--env", default="metaworld/sweep-into-v3")
    parser.add_argument("--resolution", type=int, default=64, help="pixels")
    parser.add_argument("--videos", type=int, default=200, help="episodes without actions")
    parser.add_argument("--k", type=int, default=10, help="labeled episodes")
    parser.add_argument("--lam-steps", type=int, default=800)
    parser.add_argument("--lam-gap", type=float, default=0.1, help="seconds between the LAM's two frames")
    parser.add_argument("--set", action="append", default=[], help="further setting of train-lam; repeatable")
    parser.add_argument("--pretrain-steps", type=int, default=2400)
    parser.add_argument("--tune-steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pretrain-lr", type=float, default=3e-4, help="learning rate on the videos")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate on actions; 3e-4 diverges")
    parser.add_argument(
        "--act",
        action="append",
        default=[],
        help="further flag of lerobot-train, as --act=--policy.x=1; repeatable",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--episodes", type=int, default=100, help="of each rollout; 0: none")
    parser.add_argument("--max-steps", type=int, default=120, help="of each episode of a rollout")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of the policies")
    return parser.parse_args()


def _refuse_other_settings(path: Path, options: argparse.Namespace) -> None:
    """Rows of one folder are made with the same settings; more rows and seeds may join."""
    free = ("out", "rows", "seeds", "episodes", "max_steps", "device")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    if path.is_file() and read_object(path) != settings:
        raise SystemExit(f"{path.parent} holds a table with other settings. Choose another --out.")
    write_json(path, settings)


def _collected(out: Path, options: argparse.Namespace, episodes: int, seed: int) -> Path:
    config = collect.CollectConfig(
        env=options.env, out=str(out), episodes=episodes, seed=seed, resolution=options.resolution
    )
    return collect.run(config).path


def without_labels(demonstrations: Path, out: Path) -> Path:
    """Return a copy of a dataset without actions and states: what a folder of videos holds."""
    from lerobot.datasets.dataset_tools import remove_feature
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if not out.exists():
        with atomic_dir(out) as partial:
            dataset = LeRobotDataset("local/demonstrations", root=demonstrations, video_backend="pyav")
            remove_feature(dataset, ["action", "observation.state"], partial / ".written", "local/videos")
            for part in (partial / ".written").iterdir():
                part.rename(partial / part.name)
            (partial / ".written").rmdir()
    return out


def latent_actions(videos: Path, out: Path, options: argparse.Namespace) -> Path:
    """Train a LAM on videos and return the dataset whose actions are its latent actions."""
    settings = [
        *LAM,
        f"data.path={videos}",
        f"data.resolution={options.resolution}",
        f"lam.size={options.resolution}",
        f"frame_gap_s={options.lam_gap}",
        f"training.steps={options.lam_steps}",
        *options.set,
    ]
    config = load_experiment("train_lam", train_lam.TrainLamConfig, settings)
    return precompute.run(
        precompute.PrecomputeConfig(
            lam_model_path=str(train_lam.run(config, out / "lam")),
            dataset_root=str(videos),
            output_dir=str(out / "data/latent_actions"),
            role="action",
            state_size=len(env_spec(options.env).state_names),
        )
    )


def trained(
    row: str,
    out: Path,
    demonstrations: Path,
    labeled: Path,
    pretrained: Path,
    seed: int,
    options: argparse.Namespace,
) -> Path:
    """Train the ACT of a row in a folder and return that of the policy."""
    data, steps, policy = labeled, options.pretrain_steps + options.tune_steps, ACT
    if row == "oracle":
        data = demonstrations
    if row in ("pretrained", "scratch_short"):
        steps = options.tune_steps
    if row == "pretrained":
        adapted = adapt_policy.run(
            adapt_policy.AdaptPolicyConfig(
                policy=str(pretrained), data=str(labeled), out=str(out / "adapted"), seed=seed
            )
        )
        policy = (f"--policy.path={adapted.path}",)
    return lerobot_train(data, out / "act", steps, seed, options, *policy, *rates(options.lr))


def rates(lr: float) -> tuple[str, str]:
    """Return LeRobot's flags for one learning rate of backbone and transformer."""
    return f"--policy.optimizer_lr={lr}", f"--policy.optimizer_lr_backbone={lr}"


def lerobot_train(
    data: Path, out: Path, steps: int, seed: int, options: argparse.Namespace, *policy: str
) -> Path:
    """Run LeRobot's own training, unless finished, and return the folder of the policy."""
    checkpoint = out / "checkpoints/last/pretrained_model"
    if not (checkpoint / "model.safetensors").is_file():
        shutil.rmtree(out, ignore_errors=True)
        flags = (
            *policy,
            f"--policy.device={options.device}",
            "--policy.push_to_hub=false",
            "--dataset.repo_id=local/data",
            f"--dataset.root={data}",
            "--dataset.video_backend=pyav",
            f"--batch_size={options.batch_size}",
            f"--steps={steps}",
            f"--save_freq={steps}",
            "--num_workers=0",
            "--env_eval_freq=0",
            f"--seed={seed}",
            f"--output_dir={out}",
            *options.act,
        )
        run_lerobot_train(flags)
    return checkpoint


def run_lerobot_train(flags: tuple[str, ...]) -> None:
    """Run `lerobot-train` in a process of its own."""
    script = "from lerobot.scripts.lerobot_train import main; main()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script, *flags], check=True, env=environment)


def scores(policy: Path, folder: Path, held_out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the error on held-out episodes and the result of a rollout."""
    found: dict[str, Any] = {"error": action_error(policy, held_out, options.device)}
    log.info("error of the action: %.3f", found["error"])
    if options.episodes:
        config = rollout.RolloutConfig(
            policy=str(policy),
            env=options.env,
            out=str(folder / f"rollout{options.episodes}"),
            episodes=options.episodes,
            seed=ROLLOUTS,
            max_steps=options.max_steps,
            record=0,
            device=options.device,
        )
        result = rollout.run(config)
        found["successes"] = result["successes"]
        found["max_rewards"] = [episode["max_reward"] for episode in result["per_episode"]]
    return found


def action_error(policy: Path, held_out: Path, device: str) -> float:
    """Return the mean absolute error of the first action, relative to that of the mean action."""
    store = open_store(DataConfig(path=str(held_out), resolution=0))
    actions = np.ma.getdata(store.actions(range(store.num_episodes)))
    rows = np.flatnonzero(np.isfinite(actions).all(1))[::3]
    states, agent, found = store.state, load_agent(str(policy), device), []
    for part in np.array_split(rows, max(1, len(rows) // 64)):
        agent.reset(len(part))
        observation: dict[str, Any] = {store.camera: np.asarray(store.frames[part]), "task": [""] * len(part)}
        if states is not None:
            observation["observation.state"] = states[part]
        found.append(agent.act(observation))
    truth = actions[rows]
    return float(np.abs(np.concatenate(found) - truth).mean() / np.abs(truth - truth.mean(0)).mean())


def page(rows: list[dict[str, Any]]) -> str:
    """Return the table: a row per way of training, pooled over the seeds, with 95 % intervals."""
    lines = [
        "| method | success by seed | success | largest reward | error of the action |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, label in ROWS.items():
        mine = [row for row in rows if row["row"] == name and "successes" in row]
        if not mine:
            continue
        won = np.concatenate([row["successes"] for row in mine])
        rewards = np.concatenate([row["max_rewards"] for row in mine])
        by_seed = ", ".join(f"{np.mean(row['successes']):.2f}" for row in mine)
        error = np.mean([row["error"] for row in mine])
        cells = (_number(won.mean(), success_interval(won)), _number(rewards.mean(), mean_interval(rewards)))
        lines.append(f"| {label} | {by_seed} | {cells[0]} | {cells[1]} | {error:.2f} |")
    return "\n".join([*lines, ""])


def _number(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


if __name__ == "__main__":
    main()
