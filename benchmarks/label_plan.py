"""Are planned episodes better than random ones? Success by method and number of labeled episodes: one page.

Run: python benchmarks/label_plan.py --out runs/label_plan      (re-run an interrupted command to resume it)

Every seed trains one LAM and one latent policy, on other held-out episodes; for each method of `latentact
plan` and each k, the policy is grounded on the first k episodes of the plan and rolled out. Success is
predicted for the plan of each seed from the rollouts of the other seeds with random episodes.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from latentact.composition import load_experiment
from latentact.data.mixture import TrainingDataConfig
from latentact.evaluation.policy.intervals import success_interval
from latentact.io.atomic import atomic_write, write_json
from latentact.stages import collect, compare, ground, label, plan, rollout, train_lam, train_policy

log = logging.getLogger("label_plan")

TASKS = {
    "GoToRedBall": ("babyai/GoToRedBall", "babyai", 1500),
    "drawer-open": ("metaworld/drawer-open-v3", "metaworld", 200),
}
"""Name -> environment, experiment of `latentact compare`, demonstrations."""
DIVIDED = 2
"""What the numbers of updates of LAM and policy are divided by, as in `pays.py --quick`."""
PLANNED, DRAWN = "coverage", "random"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Rollouts of all seeds with one method and one k."""

    method: str
    k: int
    rates: list[float]
    episodes: int
    """Per seed."""

    @property
    def success(self) -> float:
        """Mean success."""
        return float(np.mean(self.rates))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval, over seeds where there are several: seeds differ more than episodes."""
        if len(self.rates) == 1:
            won = round(self.success * self.episodes)
            return success_interval([True] * won + [False] * (self.episodes - won))
        draws = np.random.default_rng(0).integers(len(self.rates), size=(10_000, len(self.rates)))
        low, high = np.quantile(np.array(self.rates)[draws].mean(1), [0.025, 0.975])
        return float(low), float(high)

    def __str__(self) -> str:
        """Return mean, interval, and the rate of every seed."""
        low, high = self.interval
        return f"{self.success:.2f} ({low:.2f} to {high:.2f}): {', '.join(f'{r:.2f}' for r in self.rates)}"


def settings(task: str, out: Path, given: argparse.Namespace) -> compare.CompareConfig:
    """Collect demonstrations and return the settings of a task."""
    env, experiment, demonstrations = TASKS[task]
    data = out / "data"
    collect.run(
        collect.CollectConfig(env=env, out=str(data), episodes=given.demonstrations or demonstrations)
    )
    named = [f"experiment={experiment}", f"env={env}", f"data.path={data}", f"episodes={given.episodes}"]
    config = load_experiment("compare", compare.CompareConfig, [*named, *given.overrides])
    for group in ("lam_training", "policy_training"):
        training = getattr(config, group)
        config = replace(config, **{group: replace(training, steps=max(training.steps // DIVIDED, 1))})
    return config


def train(config: compare.CompareConfig, seed: int, out: Path) -> tuple[Path, Path]:
    """Return the folders of the labels and of the latent policy of a seed."""
    split: dict[str, Any] = {"held_out": config.held_out, "split_seed": seed}
    data = TrainingDataConfig(**vars(config.data))
    lam = train_lam.run(
        train_lam.TrainLamConfig(
            data=data,
            lam=config.lam,
            training=replace(config.lam_training, seed=seed),
            frame_gap_s=config.frame_gap_s,
            **split,
        ),
        out / "lam",
    )
    labels = label.run(
        label.LabelConfig(
            lam=str(lam), data=config.data, resolution=config.data.resolution, out=str(out / "labels")
        )
    )
    policy = train_policy.run(
        train_policy.TrainPolicyConfig(
            labels=str(labels),
            data=data,
            policy=config.policy,
            training=replace(config.policy_training, seed=seed),
            **split,
        ),
        out / "policy",
    )
    return labels, policy


def realize(
    config: compare.CompareConfig, seed: int, labels: Path, policy: Path, planned: Path, k: int
) -> float:
    """Ground a policy on the first k episodes of a plan and return its success."""
    out = planned.parent / f"k{k}"
    grounded = ground.run(
        ground.GroundConfig(
            policy=str(policy),
            labels=str(labels),
            labeled_episodes=k,
            plan=str(planned),
            decoder=config.decoder,
            training=replace(config.decoder_training, seed=seed),
            finetune_steps=config.finetune_steps,
            finetune_lr=config.finetune_lr,
            self_training=config.self_training,
            held_out=config.held_out,
            split_seed=seed,
        ),
        out / "ground",
    )
    tuned = grounded / "finetuned" if config.finetune_steps else grounded
    result = rollout.evaluate(config, tuned, out / "rollout", record=0)
    return float(result["success"])


def measure(task: str, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Ground and roll out what is missing of a task, and return its results."""
    config = settings(task, out, given)
    rates: dict[tuple[str, int], list[float]] = {}
    for seed in given.seeds:
        place = out / f"seed{seed}"
        labels, policy = train(config, seed, place)
        for method in given.methods:
            ks = given.ks if method in (PLANNED, DRAWN) else given.ks[:1]
            planned = plan.run(
                plan.PlanConfig(
                    labels=str(labels),
                    policy=str(policy),
                    budget=max(given.ks),
                    method=method,
                    held_out=config.held_out,
                    split_seed=seed,
                    out=str(place / method / "plan.json"),
                )
            )
            for k in ks:
                log.info("--- %s, seed %d, %s, k = %d", task, seed, method, k)
                found = realize(config, seed, labels, policy, planned.path, k)
                rates.setdefault((method, k), []).append(found)
    return {"rates": rates, "predicted": predict(out, given, config), "episodes": config.episodes}


def predict(out: Path, given: argparse.Namespace, config: compare.CompareConfig) -> dict[int, list[Any]]:
    """Return (predicted, low, high) of the plan of every seed by k, from the other seeds' random episodes."""
    found: dict[int, list[Any]] = {k: [] for k in given.ks}
    for seed in given.seeds:
        others = tuple(str(out / f"seed{other}" / DRAWN) for other in given.seeds if other != seed)
        planned = plan.run(
            plan.PlanConfig(
                labels=str(out / f"seed{seed}" / "labels"),
                policy=str(out / f"seed{seed}" / "policy"),
                budget=max(given.ks),
                held_out=config.held_out,
                split_seed=seed,
                results=others,
                out=str(out / f"seed{seed}" / f"predicted_from_{'_'.join(map(str, given.seeds))}.json"),
            )
        )
        for k in given.ks:
            at = planned.content["episodes"][k - 1]
            found[k].append((at["success"], *at["ci95"]))
    return found


def page(task: str, found: dict[str, Any], given: argparse.Namespace) -> list[str]:
    """Return the results of a task as lines of Markdown."""
    cells = {
        key: Cell(method=key[0], k=key[1], rates=rates, episodes=found["episodes"])
        for key, rates in found["rates"].items()
    }
    lines = [f"## {task}", "", f"| method | {' | '.join(f'k = {k}' for k in given.ks)} |"]
    lines += ["| --- |" + " --- |" * len(given.ks)]
    for method in given.methods:
        row = [str(cells.get((method, k), "")) for k in given.ks]
        lines.append(f"| {method} | {' | '.join(row)} |")
    errors = []
    for k in given.ks:
        realized = found["rates"].get((PLANNED, k), [])
        predicted = [each[0] for each in found["predicted"][k]]
        error = np.mean(predicted) - np.mean(realized)
        inside = sum(
            low <= r <= high for r, (_, low, high) in zip(realized, found["predicted"][k], strict=True)
        )
        errors.append(
            f"| {k} | {np.mean(predicted):.2f} | {np.mean(realized):.2f} | {error:+.2f} | "
            f"{np.mean(np.abs(np.subtract(predicted, realized))):.2f} | {inside} of {len(realized)} |"
        )
    head = "| k | predicted | realized | error | mean error of a seed | seeds inside the interval |"
    return [*lines, "", head, "| --- |" + " --- |" * 5, *errors, ""]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="runs/label_plan", help="run folder; re-run to resume")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--methods", nargs="+", choices=plan.METHODS, default=[*plan.METHODS])
    parser.add_argument("--ks", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--episodes", type=int, default=100, help="rollouts per seed, method and k")
    parser.add_argument("--demonstrations", type=int, default=0, help="0: those of the task")
    parser.add_argument("overrides", nargs="*", help="settings of latentact compare")
    given = parser.parse_args()
    given.methods = [*dict.fromkeys((PLANNED, DRAWN, *given.methods))]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, lines = Path(given.out), ["# Planned and random episodes", ""]
    for task in given.tasks:
        found = measure(task, out / task, given)
        rates = {f"{method}_k{k}": each for (method, k), each in found["rates"].items()}
        write_json(out / task / "label_plan.json", {**found, "rates": rates})
        lines += page(task, found, given)
        with atomic_write(out / "label_plan.md") as partial:
            partial.write_text("\n".join(lines))
    print((out / "label_plan.md").read_text())


if __name__ == "__main__":
    main()
