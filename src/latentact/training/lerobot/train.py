"""Training of LeRobot policies, also on LAM tokens, with the parts of `lerobot-train`."""

from __future__ import annotations

import importlib
import logging
import shutil
from argparse import ArgumentError
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from safetensors.torch import load_model
from torch.utils.data import DataLoader

from latentact.data.cache import DataConfig
from latentact.data.latents import TokenFile, TokensRecord
from latentact.data.lerobot.source import lerobot_version
from latentact.data.lerobot.token_dataset import TokenDataset
from latentact.data.lerobot.writer import number_statistics, require_lerobot
from latentact.data.stream import FrameStream
from latentact.errors import UserError
from latentact.io.atomic import atomic_dir
from latentact.io.records import read_record
from latentact.progress import Progress
from latentact.training.metrics_csv import MetricsCsv
from latentact.types import LatentActionSpec

log = logging.getLogger(__name__)

PLUGIN = "lerobot_policy_latentact"


def require_plugin() -> None:
    """Import the policy plugin, or raise an error with the command that installs it."""
    require_lerobot()
    try:
        importlib.import_module(PLUGIN)
    except ModuleNotFoundError as error:
        if error.name != PLUGIN:
            raise
        raise UserError(
            f"{PLUGIN} is not installed; in latentact's repository, run: pip install plugins/{PLUGIN}."
        ) from error


def lerobot_settings(
    config: Any, root: Path, tokens: TokenFile | None, episodes: list[int] | None = None
) -> Any:
    """Return LeRobot's training configuration; the shape of the tokens comes from their metadata.

    Args:
        config: the stage's `TrainWithTokensConfig` or `TrainLeRobotConfig`.
        root: LeRobot dataset.
        tokens: token file, if the tokens are not a column of the dataset.
        episodes: episodes to train on; None: all.
    """
    import draccus
    import lerobot.policies  # noqa: F401, it registers them
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig

    known: dict[str, Any] = {"device": config.device, "push_to_hub": "false"}
    if config.learning_rate:
        known["optimizer_lr"] = config.learning_rate
    sidecar = root / "meta" / "lam_tokens.json"
    if tokens is not None:
        known |= _shape(tokens.spec, tokens.tokens_kind)
    elif config.policy.startswith("lam_") and sidecar.is_file():
        about = read_record(TokensRecord, sidecar)
        known |= _shape(about.spec.spec(), about.tokens)
    known |= dict(setting.split("=", 1) for setting in config.overrides)
    try:
        policy: Any = draccus.parse(
            PreTrainedConfig.get_choice_class(config.policy),
            args=[f"--{key}={value}" for key, value in known.items()],
            exit_on_error=False,
        )
    except (ArgumentError, draccus.utils.DraccusException, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{config.policy} does not accept these settings: {reason}.") from error
    if tokens is not None and not (policy.use_lam_conditioning and policy.use_precomputed_lam_tokens):
        raise UserError(
            "--lam-tokens-path must not be given with use_precomputed_lam_tokens=false; drop one of them."
        )
    repo_id = config.dataset_repo_id.partition("@")[0] or root.name
    data = DatasetConfig(repo_id, root=str(root), video_backend="pyav", episodes=episodes)
    return TrainPipelineConfig(
        dataset=data,
        policy=policy,
        output_dir=Path(config.out),
        job_name=config.policy,
        seed=config.seed,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        optimizer=policy.get_optimizer_preset(),
        scheduler=policy.get_scheduler_preset(),
    )


def _shape(spec: LatentActionSpec, tokens: str) -> dict[str, Any]:
    return {
        "lam_num_learned_tokens": spec.tokens,
        "lam_action_latent_dim": spec.token_dim,
        "lam_use_vq_tokens": str(tokens == "vq").lower(),
    }


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch as lerobot-train does."""
    from lerobot.utils.random_utils import set_seed

    set_seed(seed)


def open_dataset(train: Any, tokens: TokenFile | None) -> Any:
    """Open the dataset as lerobot-train does, with the tokens of the token file, if any."""
    from lerobot.datasets.factory import make_dataset

    root, policy = Path(train.dataset.root), train.policy
    version = lerobot_version(root)
    if not version.startswith("v3"):
        raise UserError(
            f"{root} is {f'a LeRobot dataset of {version}' if version else 'not a LeRobot dataset'}; "
            f"convert it to v3 with latentact precompute --output column."
        )
    dataset: Any = make_dataset(train)
    for column in ("action", "observation.state"):
        if column not in dataset.meta.features:
            raise UserError(f"{root} has no column {column!r}, which the policy needs; give demonstrations.")
    if tokens is None:
        return dataset
    policy.check_tokens(vars(tokens.spec), str(tokens.path), tokens.tokens_kind)
    with_tokens = TokenDataset(dataset, tokens, policy.lam_tokens_key, policy.observation_delta_indices)
    _refuse_other_frames(tokens, root)
    return with_tokens


def _refuse_other_frames(tokens: TokenFile, root: Path) -> None:
    """Raise a UserError for tokens of a dataset with the same number of rows but other frames."""
    camera = str(tokens.metadata.get("camera", ""))
    data = DataConfig(path=str(root), camera=camera, resolution=tokens.spec.resolution)
    if FrameStream(data).key != tokens.digest:
        raise UserError(
            f"{tokens.path} must hold the tokens of {root}, got those of other frames. Precompute the tokens "
            f"of this dataset."
        )


class LeRobotTrainee:
    """Policy, optimizer, schedule and data, created and stepped as in lerobot-train.

    Args:
        train: LeRobot's settings; the number of steps is set here.
        dataset: training data.
        epochs: passes over the dataset; None: as many as `steps` need.
        steps: minimum number of steps if `epochs` is None.
    """

    def __init__(self, train: Any, dataset: Any, epochs: int | None, steps: int = 1) -> None:
        from accelerate import Accelerator
        from lerobot.datasets import EpisodeAwareSampler
        from lerobot.optim.factory import make_optimizer_and_scheduler
        from lerobot.policies import make_policy, make_pre_post_processors

        meta, policy = dataset.meta, train.policy
        self._train, self._cameras, self.loss = train, meta.camera_keys, float("nan")
        try:
            self._policy = make_policy(policy, ds_meta=meta).train()
        except URLError as error:
            raise UserError(
                f"the policy's vision backbone cannot be downloaded ({error.reason}); try again, "
                f"or start from random ones with --policy-override pretrained_backbone_weights=null."
            ) from error
        stats = meta.stats if dataset.episodes is None else {**meta.stats, "action": _action_stats(dataset)}
        self._before, self._after = make_pre_post_processors(policy, dataset_stats=stats)
        sampler = EpisodeAwareSampler(
            meta.episodes["dataset_from_index"],
            meta.episodes["dataset_to_index"],
            episode_indices_to_use=dataset.episodes,
            absolute_to_relative_idx=dataset.absolute_to_relative_idx,
            drop_n_last_frames=getattr(policy, "drop_n_last_frames", 0),
            shuffle=True,
            seed=train.seed,
        )
        loader = DataLoader(dataset, train.batch_size, sampler=sampler, num_workers=train.num_workers)
        self.steps_per_epoch = len(loader)
        self.epochs = -(-steps // self.steps_per_epoch) if epochs is None else epochs
        train.steps = self.epochs * self.steps_per_epoch
        optimizer, schedule = make_optimizer_and_scheduler(train, self._policy)
        self._accelerator = Accelerator(step_scheduler_with_optimizer=False, cpu=policy.device == "cpu")
        self._model, self._optimizer, self._loader, self._schedule = self._accelerator.prepare(
            self._policy, optimizer, loader, schedule
        )

    def epoch(self, progress: Progress) -> None:
        """Run one pass over the data and set `loss` to its mean."""
        from lerobot.scripts.lerobot_train import update_policy
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

        size, names = self._train.batch_size, ("loss", "grad_norm", "lr", "update_s", "gpu_mem_gb")
        meters = {name: AverageMeter(name) for name in names}
        tracker: Any = MetricsTracker(size, self.steps_per_epoch * size, 1, meters)
        for batch in self._loader:
            for camera in self._cameras:
                if batch[camera].dtype == torch.uint8:
                    batch[camera] = batch[camera].float() / 255
            update_policy(
                tracker,
                self._model,
                self._before(batch),
                self._optimizer,
                self._train.optimizer.grad_clip_norm,
                self._accelerator,
                self._schedule,
            )
            progress.advance(1)
        self.loss = tracker.loss.avg

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint in LeRobot's format, atomically."""
        from lerobot.common.train_utils import save_checkpoint, update_last_checkpoint

        with atomic_dir(folder) as partial:
            save_checkpoint(
                partial,
                step,
                self._train,
                self._policy,
                self._optimizer,
                self._schedule,
                self._before,
                self._after,
                num_processes=1,
                batch_size=self._train.batch_size,
            )
        update_last_checkpoint(folder)

    def load(self, folder: Path) -> int:
        """Load a checkpoint; return its number of steps."""
        from lerobot.common.train_utils import load_training_state

        load_model(self._policy, folder / "pretrained_model" / "model.safetensors")
        step, _, _ = load_training_state(folder, self._optimizer, self._schedule)
        self._loader.set_epoch(step // self.steps_per_epoch)
        return step


def _action_stats(dataset: Any) -> dict[str, Any]:
    """Return the statistics of the actions of the chosen episodes; those of all would use hidden labels."""
    actions = np.stack([*dataset.hf_dataset.with_format("numpy")["action"]])
    return number_statistics({"action": actions})["action"]


def run_epochs(trainee: LeRobotTrainee, out: Path, checkpoints: int = 0) -> None:
    """Train all epochs, or resume.

    Args:
        trainee: the policy and its data.
        out: run folder.
        checkpoints: number of checkpoints, each of which replaces the one before; 0: one per epoch, all kept.
    """
    folder, epochs, each = out / "checkpoints", trainee.epochs, trainee.steps_per_epoch
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)
    newest = max((path for path in folder.glob("*") if path.name.isdigit()), default=None)
    step = trainee.load(newest) if newest else 0
    if newest:
        log.info("resuming from step %d of %s", step, out)
    total, every = epochs * each, max(1, epochs // checkpoints) if checkpoints else 1
    metrics = MetricsCsv(out, step)
    with Progress("training", total, "steps", done=step) as progress:
        for epoch in range(step // each + 1, epochs + 1):
            trainee.epoch(progress)
            step = epoch * each
            metrics.log_metrics({"epoch": float(epoch), "loss": trainee.loss}, step)
            if epoch % every and epoch < epochs:
                continue
            older = [path for path in folder.glob("*") if path.name.isdigit()] if checkpoints else []
            trainee.save(folder / f"{step:0{max(6, len(str(total)))}d}", step)
            for path in older:
                shutil.rmtree(path)
            log.info("epoch %d of %d: loss %.4f", epoch, epochs, trainee.loss)
