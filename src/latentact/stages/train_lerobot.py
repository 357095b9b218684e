"""Train LeRobot's ACT or Diffusion Policy on the labeled episodes of a dataset: rows of `compare`.

`lam_act` also gets the tokens of a latent action model, dropped in half of its samples, because a rollout has
no guide.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout

from latentact.config import BatchSize, Between, Count, OneOf, Seed, Workers, check_bounds
from latentact.data.lerobot.source import lerobot_version
from latentact.data.lerobot.writer import require_lerobot
from latentact.data.store import FrameStore
from latentact.device import select_device
from latentact.errors import UserError, require_between, require_one_of
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
from latentact.types import ActionSpace

POLICIES = ("act", "diffusion", "lam_act")
RESULT = "train_lerobot.json"
CHECKPOINTS = 4
ACT = (
    "dim_model=256 n_heads=4 dim_feedforward=1024 n_encoder_layers=2 latent_dim=16 chunk_size=20 "
    "n_action_steps=10 pretrained_backbone_weights=null"
)


@dataclass(frozen=True, kw_only=True)
class LeRobotRecipe:
    """LeRobot's settings of the rows act_k, diffusion_k and lam_act_k: `KEY=VALUE KEY=VALUE`."""

    batch_size: int = 0
    """Batch size of these rows; 0: that of policy_training."""

    act: str = ACT
    """ACT."""
    diffusion: str = (
        "horizon=16 n_action_steps=8 down_dims=[64,128,256] noise_scheduler_type=DDIM num_inference_steps=10 "
        "pretrained_backbone_weights=null"
    )
    """Diffusion Policy."""
    lam_act: str = f"{ACT} lam_dropout=0.5"
    """ACT with LAM tokens."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_between("lerobot.batch_size", self.batch_size, 0, 1 << 20)
        for name in ("act", "diffusion", "lam_act"):
            for setting in getattr(self, name).split():
                if "=" not in setting:
                    raise UserError(
                        f"lerobot.{name} must be KEY=VALUE pairs separated by spaces, got {setting!r}."
                    )


@dataclass(frozen=True, kw_only=True)
class TrainLeRobotConfig:
    """Train a LeRobot policy on some episodes of a LeRobot dataset."""

    out: str
    """Run folder; re-run the same command to resume."""
    dataset_root: str
    """LeRobot v3 dataset with actions and states."""
    policy: Annotated[str, OneOf(POLICIES)]
    """act, diffusion or lam_act."""
    episodes: tuple[int, ...]
    """Episodes whose actions are used."""
    steps: Count
    """Updates, rounded up to whole passes over the episodes."""
    batch_size: BatchSize = 64
    """Samples per step."""
    learning_rate: Annotated[float, Between(0, 100)] = 0.0
    """Peak learning rate; 0: the policy's own."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    seed: Seed = 0
    """Seed of weights, order and noise."""
    num_workers: Workers = 0
    """Data loader processes; 0: load in the main process."""
    overrides: tuple[str, ...] = field(default=())
    """Settings of the policy, as KEY=VALUE."""
    dataset_repo_id: str = ""
    """Name of the dataset; empty: that of its folder."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("policy", self.policy, POLICIES)
        check_bounds(self)


def run(config: TrainLeRobotConfig) -> Path:
    """Train; return the run folder, which is also an agent's."""
    out, root = Path(config.out), Path(config.dataset_root)
    if finished(out, config, RESULT):
        return out
    if config.policy.startswith("lam_"):
        require_plugin()
    train = lerobot_settings(
        replace(config, device=select_device(config.device)), root, None, [*config.episodes]
    )
    seed_everything(config.seed)
    trainee = LeRobotTrainee(train, open_dataset(train, None), None, config.steps)
    with run_folder(out, config):
        try:
            with FileLock(out / ".lock", timeout=0):
                run_epochs(trainee, out, CHECKPOINTS)
        except Timeout as error:
            raise Busy(
                f"another process is training in {out}; wait for it, or choose another out=."
            ) from error
        write_json(out / RESULT, {"episodes": len(config.episodes), "steps": train.steps})
    return out


def check(store: FrameStore, methods: list[str]) -> None:
    """Raise a UserError if LeRobot's policies cannot learn from the data, before anything is written."""
    require_lerobot()
    named = ", ".join(methods)
    space: ActionSpace | None = store.action_space
    if space is None or space.discrete:
        raise UserError(
            f"the actions of {store.path} must be continuous for {named}, because LeRobot's ACT and "
            f"Diffusion Policy are regressors, got {space or 'none'}. Remove these rows from methods."
        )
    version = lerobot_version(Path(store.path))
    if store.state is None or not version.startswith("v3"):
        found = f"LeRobot {version}" if version else "another format"
        raise UserError(
            f"{store.path} must be a LeRobot v3 dataset with observation.state for {named}, got {found} "
            f"{'without' if store.state is None else 'with'} a state. Remove these rows from methods."
        )
