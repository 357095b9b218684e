"""CLAM's ablation (arXiv 2505.04999) on Meta-World from states: codes or vectors, separate or joint decoder.

Run: python benchmarks/clam.py --out runs/clam      (re-run an interrupted command to resume it)

Videos are an expert's demonstrations, whose robot actions are hidden; the labels are those of random play.
An observation is Meta-World's whole state instead of a frame. Each seed trains four LAMs, with a bottleneck
of codes or of continuous vectors, and without labels (the decoder learns afterwards) or jointly with a
decoder; for each one a latent policy on the expert's episodes, and a decoder on the play. Baselines have the
same labels: BC on the play itself, and BC on what an inverse dynamics model of the play infers for the
expert's episodes. The oracle is BC on the expert's robot actions.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from latentact.data.cache import DataConfig
from latentact.data.mixture import MixturePart, TrainingDataConfig, open_training_store
from latentact.data.plan import plan_entry
from latentact.data.splits import split_episodes
from latentact.envs.spec import env_spec
from latentact.evaluation.policy.intervals import success_interval
from latentact.io.atomic import atomic_write, write_json
from latentact.lams.models.clam import ClamConfig
from latentact.lams.models.idm import IdmConfig
from latentact.policies.bc import BcConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.quantizers.none import WhitenedConfig
from latentact.quantizers.vq_ema import VqEmaConfig
from latentact.stages import collect, ground, label, rollout, train_lam, train_policy
from latentact.training.settings import TrainingConfig

log = logging.getLogger("clam")

ROWS = {
    "codes_separate": "Codes, separate decoder",
    "codes_joint": "Codes, joint decoder",
    "continuous_separate": "Continuous, separate decoder",
    "continuous_joint": "Continuous, joint decoder (CLAM)",
    "bc": "BC on the play",
    "idm": "BC on the actions of an inverse dynamics model",
    "oracle": "Oracle: BC on the expert's actions",
}
PLAY, ROLLOUTS = 1_000_000, 100_000
"""First reset seeds; those of the demonstrations begin at 0."""
SIDE = 32
"""Pixels of the frames, which are black."""
BOTTLENECKS = {
    "codes": VqEmaConfig(dim=32, codebooks=2, positions=1, codebook_size=16, guard=True),
    "continuous": WhitenedConfig(dim=8),
}
HIDDEN = 256
LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Data:
    """Demonstrations, play, and the plan that labels play in a mixture of both."""

    demonstrations: str
    play: str
    plan: str
    labeled: int
    """Episodes of the plan: all of the play, but for one where training holds that one out."""

    @property
    def mixture(self) -> TrainingDataConfig:
        """Both, of which `plan` labels the play."""
        parts = (MixturePart(path=self.demonstrations), MixturePart(path=self.play))
        return TrainingDataConfig(mixture=parts, resolution=SIDE)


def data(out: Path, given: argparse.Namespace) -> Data:
    """Collect what is missing of the data."""
    common: dict[str, Any] = {"env": given.env, "view": "full", "frames": False, "resolution": SIDE}
    names = {name: str(out / name) for name in ("demonstrations", "play")}
    found = Data(**names, plan=str(out / "plan.json"), labeled=given.k)
    collect.run(collect.CollectConfig(out=found.demonstrations, episodes=given.demonstrations, **common))
    play = {"policy": "random", "episodes": given.k, "max_steps": given.play_steps, "seed": PLAY}
    play["action_repeat"] = given.play_repeat
    collect.run(collect.CollectConfig(out=found.play, **play, **common))
    mixed = open_training_store(found.mixture)
    train, _ = split_episodes(mixed, held_out=0.0, seed=0)
    played = train[train >= given.demonstrations].tolist()
    write_json(out / "plan.json", {"episodes": [plan_entry(mixed, episode) for episode in played]})
    return replace(found, labeled=len(played))


def training(steps: int, seed: int, **settings: Any) -> TrainingConfig:
    """Return the settings of one training."""
    return TrainingConfig(steps=steps, seed=seed, lr=LR, eval_every=0, **settings)


def trained(row: str, seed: int, found: Data, out: Path, given: argparse.Namespace) -> Path:
    """Train the policy of a row and return its folder."""
    state = len(env_spec(given.env, view="full").state_names)
    play = TrainingDataConfig(path=found.play, resolution=SIDE)
    expert = TrainingDataConfig(path=found.demonstrations, resolution=SIDE)
    network = NetworkConfig(backbone="state", hidden=(HIDDEN, HIDDEN))
    bc = train_policy.TrainPolicyConfig(
        policy=BcConfig(network=network), training=training(given.policy_steps, seed), held_out=0.0
    )
    if row in ("bc", "oracle"):
        return train_policy.run(replace(bc, data=play if row == "bc" else expert), out / "policy")
    lam, labeled = _lam(row, state), row == "idm" or row.endswith("joint")
    model = train_lam.run(
        train_lam.TrainLamConfig(
            data=found.mixture,
            lam=lam,
            training=training(given.lam_steps, seed),
            plan=found.plan if labeled else "",
            labeled_episodes=found.labeled if labeled else 0,
            frame_gap_s=0.0 if row == "idm" else given.frame_gap_s,
            held_out=0.0,
        ),
        out / "lam",
    )
    labels = _labels(model, found.demonstrations, out / "labels")
    if row == "idm":
        return train_policy.run(replace(bc, labels=labels), out / "policy")
    target = "codes" if row.startswith("codes") else "continuous"
    policy = train_policy.run(
        replace(bc, labels=labels, policy=LatentConfig(network=network, target=target)), out / "policy"
    )
    return ground.run(
        ground.GroundConfig(
            policy=str(policy),
            labels=_labels(model, found.play, out / "play_labels"),
            labeled_episodes=given.k - 1,  # the other one is held out for the decoder's score
            training=training(given.decoder_steps, seed),
            held_out=0.0,
        ),
        out / "grounded",
    )


def _lam(row: str, state: int) -> ClamConfig | IdmConfig:
    if row == "idm":
        return IdmConfig(backbone="state", state_size=state, hidden=HIDDEN)
    kind, _, decoder = row.partition("_")
    return ClamConfig(
        observations="state",
        state_size=state,
        hidden=HIDDEN,
        decoder=(HIDDEN, HIDDEN),
        bottleneck=BOTTLENECKS[kind],
        action_weight=1.0 if decoder == "joint" else 0.0,
    )


def _labels(lam: Path, dataset: str, out: Path) -> str:
    return str(label.run(label.LabelConfig(lam=str(lam), data=DataConfig(path=dataset), out=str(out))))


def scores(policy: Path, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return the rollout of a policy."""
    return rollout.run(
        rollout.RolloutConfig(
            policy=str(policy),
            env=given.env,
            view="full",
            out=str(out / "rollout"),
            episodes=given.episodes,
            seed=ROLLOUTS,
            max_steps=given.max_steps,
            record=0,
        )
    )


def page(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    """Return the table: a row per method, pooled over the seeds, with 95 % intervals."""
    lines = [f"| {given.env} | success by seed | success |", "| --- | --- | --- |"]
    for name, text in ROWS.items():
        mine = [row for row in rows if row["row"] == name]
        if mine:
            won = np.concatenate([row["successes"] for row in mine])
            low, high = success_interval(won)
            by_seed = ", ".join(f"{np.mean(row['successes']):.2f}" for row in mine)
            lines.append(f"| {text} | {by_seed} | {won.mean():.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="runs/clam", help="run folder; re-run to resume")
    parser.add_argument("--env", default="metaworld/reach-v3")
    parser.add_argument("--demonstrations", type=int, default=200, help="episodes of the expert, unlabeled")
    parser.add_argument("--k", type=int, default=50, help="labeled episodes of random play")
    parser.add_argument("--play-steps", type=int, default=200, help="of each of them")
    parser.add_argument("--play-repeat", type=int, default=8, help="steps that a random action is repeated")
    parser.add_argument("--frame-gap-s", type=float, default=0.05, help="between a LAM's two observations")
    parser.add_argument("--lam-steps", type=int, default=3000)
    parser.add_argument("--policy-steps", type=int, default=3000)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=50, help="rollouts per row and seed")
    parser.add_argument("--max-steps", type=int, default=150, help="of each episode of a rollout")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, rows = Path(given.out), []
    found = data(out / "data", given)
    for seed in given.seeds:
        for row in given.rows:
            log.info("--- %s, seed %d", ROWS[row], seed)
            folder = out / f"seed{seed}" / row
            result = scores(trained(row, seed, found, folder, given), folder, given)
            rows.append({"row": row, "seed": seed, "successes": result["successes"]})
            write_json(out / "rows.json", rows)
    with atomic_write(out / "clam.md") as partial:
        partial.write_text(page(rows, given))
    print((out / "clam.md").read_text())


if __name__ == "__main__":
    main()
