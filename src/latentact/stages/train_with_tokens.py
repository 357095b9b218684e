"""Train `lam_diffusion` or `lam_act` without LeRobot's command line: `latentact train-with-tokens`.

Training equals that of lerobot-train step by step and uses its parts. In addition, tokens may be in a
separate file, the length is in epochs, and a killed run resumes from its last epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout

from latentact.config import BatchSize, Between, Count, OneOf, Seed, Workers, check_bounds
from latentact.data.latents import read_token_file
from latentact.data.locate import local_dataset
from latentact.device import require_device
from latentact.errors import UserError, require_one_of
from latentact.io.atomic import write_json
from latentact.training.lerobot.train import (
    LeRobotTrainee,
    lerobot_settings,
    open_dataset,
    require_plugin,
    run_epochs,
    seed_everything,
)
from latentact.training.run_folder import Busy, finished, run_folder

POLICIES = ("lam_diffusion", "lam_act")
RESULT = "train_with_tokens.json"


@dataclass(frozen=True, kw_only=True)
class TrainWithTokensConfig:
    """Train a LeRobot policy that is conditioned on LAM tokens."""

    out: str
    """Run folder; re-run the same command to resume."""
    dataset_repo_id: str = ""
    """LeRobot v3 dataset: hub id, or any name where `dataset_root` is given."""
    dataset_root: str = ""
    """Its folder; empty: LeRobot's download folder, or the hub."""
    lam_tokens_path: str = ""
    """Token file of `latentact precompute --output file`; empty: the dataset has the column."""
    policy: Annotated[str, OneOf(POLICIES)] = "lam_diffusion"
    """lam_diffusion or lam_act."""
    num_epochs: Count = 100
    """Passes over the dataset."""
    batch_size: BatchSize = 8
    """Samples per step."""
    learning_rate: Annotated[float, Between(0, 100)] = 0.0
    """Peak learning rate; 0: the policy's own."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    seed: Seed = 1000
    """Seed of weights, order and noise."""
    num_workers: Workers = 0
    """Data loader processes; 0: load in the main process."""
    overrides: tuple[str, ...] = ()
    """Settings of the policy, as KEY=VALUE."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("--policy", self.policy, POLICIES)
        check_bounds(self)
        for setting in self.overrides:
            if "=" not in setting:
                raise UserError(
                    f"--policy-override must be KEY=VALUE, such as lam_dropout=0.1, got {setting!r}."
                )


def run(config: TrainWithTokensConfig) -> Path:
    """Train; return the policy folder of the last checkpoint."""
    out = Path(config.out)
    require_device(config.device)
    last = out / "checkpoints" / "last" / "pretrained_model"
    if finished(out, config, RESULT):
        return last
    require_plugin()
    tokens = read_token_file(config.lam_tokens_path) if config.lam_tokens_path else None
    root = local_dataset(config.dataset_repo_id, config.dataset_root)
    train = lerobot_settings(config, root, tokens)
    seed_everything(config.seed)
    dataset = open_dataset(train, tokens)
    trainee = LeRobotTrainee(train, dataset, config.num_epochs)
    with run_folder(out, config):
        try:
            with FileLock(out / ".lock", timeout=0):
                run_epochs(trainee, out)
        except Timeout as error:
            raise Busy(
                f"another process is training in {out}; wait for it, or choose another --output-dir."
            ) from error
        write_json(out / RESULT, {"epochs": config.num_epochs, "steps": train.steps})
    return last
