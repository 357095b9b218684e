"""The training loop of every model: Lightning with deterministic steps, exact resume, `metrics.csv`.

Batch and random numbers of a step are functions of (seed, step): a killed run that resumes from its last
checkpoint ends with the same weights as an undisturbed one.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from latentact import preemption
from latentact.data.transforms import augment_batch
from latentact.device import keep_freed_memory
from latentact.errors import UserError
from latentact.training.checkpoint_io import FolderCheckpointIO
from latentact.training.metrics_csv import MetricsCsv
from latentact.training.peers import training_lock
from latentact.training.run_folder import saved_steps
from latentact.training.settings import TrainingConfig, get_precision
from latentact.training.strategies import ShardedLoss, build_environment, build_strategy

log = logging.getLogger(__name__)
_STEPS_PER_CHECK = 8
_AUGMENT = 1
"""Last number of the seeds of augmentation, so that they differ from those of batches."""
for _name in (
    "lightning.pytorch",
    "lightning.fabric",
):  # startup messages; errors and progress are raised and logged here
    logging.getLogger(_name).setLevel(logging.ERROR)


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainingConfig,
    out: Path,
    evaluate: Callable[[bool], dict[str, float]] | None,
    state_std: Tensor | None,
) -> None:
    """Implementation of `training.fit.fit`."""
    checkpoints = out / "checkpoints"
    newest = max(saved_steps(out), default=None, key=_step_of)
    start = _step_of(newest) if newest else 0
    if newest:
        log.info("resuming from step %d of %s", start, out)
    world = config.devices * config.num_nodes
    loader = DataLoader(
        data,
        batch_sampler=_Steps(data, config, start, world),  # type: ignore[arg-type]
        collate_fn=_same,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
    )
    loggers: list[Any] = [MetricsCsv(out, start), TensorBoardLogger(out, name="tensorboard", version="")]
    if config.wandb:
        loggers.append(WandbLogger(project="latentact", name=out.name, save_dir=out))
    terminal = Console(stderr=True).is_terminal
    progress = _Progress(model, config, checkpoints, evaluate)
    trainer = pl.Trainer(
        accelerator=config.device,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=build_strategy(config),
        accumulate_grad_batches=config.accumulate,
        precision=get_precision(config),  # type: ignore[arg-type]
        max_steps=config.steps,
        max_epochs=-1,
        gradient_clip_val=config.grad_clip or None,
        logger=loggers,
        callbacks=[progress, *([RichProgressBar()] if terminal else [])],
        plugins=[FolderCheckpointIO(), *build_environment(config)],
        default_root_dir=out,
        enable_checkpointing=False,
        enable_progress_bar=terminal,
        enable_model_summary=False,
        log_every_n_steps=config.log_every,
        use_distributed_sampler=False,
    )
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    kind = _ShardedModule if config.strategy == "fsdp" else _Module
    module = kind(model, config, state_std)
    try:
        with training_lock(out, trainer.global_rank, world), preemption.deferred():
            if trainer.is_global_zero:
                for leftover in checkpoints.glob(".*.partial"):
                    shutil.rmtree(leftover)
            trainer.fit(module, loader, ckpt_path=newest)  # also loads it when all steps are done
            if not progress.preempted:
                module.finish(model)
    except SystemExit as stopped:  # Lightning turns Ctrl-C into an exit
        raise KeyboardInterrupt from stopped
    if not trainer.is_global_zero:
        sys.exit(0)  # the first process does the rest
    if progress.preempted:
        log.info("stopped at step %d of %s; re-run the command to resume", trainer.global_step, out)
        preemption.stop()
    model.eval()


def compiled(loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]) -> Callable[[Any], Any]:
    """Return a loss function that runs through torch.compile.

    The compiled graph returns the loss as a vector: the compiler merges equal outputs, and a loss merged with
    a detached metric, such as `recon + 0` with `recon.detach()`, has no gradient (torch 2.11).
    """

    def as_vector(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = loss(batch)
        return value.unsqueeze(0), metrics

    run: Any = torch.compile(as_vector)

    def as_number(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = run(batch)
        return value[0], metrics

    return as_number


@runtime_checkable
class HasParameterGroups(Protocol):
    """A module with its own learning rates or weight decays."""

    def parameter_groups(self) -> list[Any]:
        """Return the parameter groups."""
        ...


@runtime_checkable
class HasOrder(Protocol):
    """A dataset that chooses the samples of a step itself, such as a mixture."""

    order: Callable[[int, int, int], np.ndarray]
    """Returns the positions of a step: `order(seed, step, batch_size)`."""


class _Module(pl.LightningModule):
    """Loss, optimizer and schedule for Lightning."""

    def __init__(self, model: nn.Module, config: TrainingConfig, state_std: Tensor | None = None) -> None:
        super().__init__()
        if any(parameter.ndim == 5 for parameter in model.parameters()):  # which cannot be channels last
            self.model = model
        else:
            self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = config
        loss: Any = model.loss
        self.compute = compiled(loss) if config.compile else loss
        self.state_std = state_std
        self.slices: list[dict[str, Tensor]] = []
        """Loss and metrics of each slice of the current step."""

    def on_train_start(self) -> None:
        # A fused optimizer reads its state in the memory layout of the parameters; a checkpoint has lost it.
        for parameter, state in self.trainer.optimizers[0].state.items():
            for name, value in state.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter).copy_(value)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.config.accumulate == 0:
            self.slices.clear()
            # The first process has the same noise as a single-process run.
            torch.manual_seed(self.config.seed * 1_000_003 + self.global_step + (self.global_rank << 40))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if self.config.augment.inputs:
            part = (self.global_rank, batch_idx % self.config.accumulate, _AUGMENT)
            rng = np.random.default_rng((self.config.seed, self.global_step, *part))
            batch = augment_batch(batch, self.config.augment, rng, self.state_std)
        loss, metrics = self.compute(batch)
        self.slices.append({"loss": loss.detach()} | metrics)
        return {"loss": loss}

    def step_metrics(self) -> dict[str, float]:
        """Return loss and metrics of the current step, averaged over its slices and all processes."""
        values = [[float(values[name]) for name in self.slices[0]] for values in self.slices]
        means = torch.tensor(values, dtype=torch.float64).mean(0)
        if self.trainer.world_size > 1:
            means = self.trainer.strategy.reduce(means.to(self.device))
        return dict(zip(self.slices[0], means.tolist(), strict=True))

    def gather(self, model: nn.Module) -> None:
        """Update `model`; it is the trained module itself."""

    def finish(self, model: nn.Module) -> None:
        """Update `model` after training."""
        self.gather(model)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(str(device))

    def configure_optimizers(self) -> Any:
        c = self.config

        def factor(step: int) -> float:
            ends = [0, min(c.warmup_steps, c.steps - 1), c.steps + 1]
            if step < ends[1] or c.lr_schedule == "linear":
                return float(np.interp(step, ends, [0.1, 1.0, c.final_lr_factor]))
            if c.lr_schedule == "constant":
                return 1.0
            way = (step - ends[1]) / (ends[2] - ends[1])
            return c.final_lr_factor + (1 - c.final_lr_factor) * (1 + math.cos(math.pi * way)) / 2

        fused = c.precision != "16-mixed"  # whose loss scale a fused step removes only after clipping
        groups = _parameter_groups(self.trained, c)
        optimizer = torch.optim.AdamW(groups, c.lr, c.betas, weight_decay=c.weight_decay, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        # Lightning's own rejects fused optimizers because of loss scaling.
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.trained.parameters(), gradient_clip_val)

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters are trained."""
        return self.model


class _ShardedModule(_Module):
    """The same for a sharded copy of the model."""

    model: ShardedLoss  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(self, model: nn.Module, config: TrainingConfig, state_std: Tensor | None) -> None:
        super().__init__(model, config, state_std)
        self.model = ShardedLoss(model)
        self.compute = self.model.__call__  # the module itself would be registered twice
        self.sharded = False

    @property
    def trained(self) -> nn.Module:
        """The sharded copy."""
        return self.model.trained

    def configure_model(self) -> None:
        if not self.sharded:
            assert self.device_mesh is not None
            self.model.shard(self.device_mesh["data_parallel"])
            self.sharded = True

    def gather(self, model: nn.Module) -> None:
        """Copy the weights of all shards into `model`, in the first process."""
        self.model.gather(model)


def _parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: all trained parameters without a group, then the model's groups."""
    has_groups = isinstance(model, HasParameterGroups)  # pyrefly: ignore[unsafe-overlap]
    named = model.parameter_groups() if has_groups else []
    groups: list[dict[str, Any]] = [
        {
            "params": group["params"],
            "lr": config.lr * group.get("lr_factor", 1.0),
            "weight_decay": group.get("weight_decay", config.weight_decay),
        }
        for group in named
    ]
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [{"params": rest}, *groups] if rest else groups


class _Steps:
    """Endless slices of batches of positions.

    A step's batch is a function of (seed, step). Slice i of process r of w holds its positions r + i * w,
    r + i * w + n, ... where n = w * accumulate.
    """

    def __init__(self, data: Any, config: TrainingConfig, start: int, world: int) -> None:
        self.order = data.order if isinstance(data, HasOrder) else partial(_uniform, len(data))
        self.config, self.start, self.world = config, start, world

    def __iter__(self) -> Iterator[list[int]]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        step = self.start
        while True:
            positions = self.order(self.config.seed, step, self.config.batch_size)
            for i in range(self.config.accumulate):
                yield positions[rank + i * self.world :: self.world * self.config.accumulate].tolist()
            step += 1


def _uniform(length: int, seed: int, step: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, step)).integers(length, size=size)


class _Progress(pl.Callback):
    """Metrics rows, progress lines, evaluations and checkpoints at their steps."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        folder: Path,
        evaluate: Callable[[bool], dict[str, float]] | None,
    ) -> None:
        self.model, self.config, self.folder, self.evaluate = model, config, folder, evaluate
        self.began, self.began_step = 0.0, 0
        self.preempted = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began, self.began_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.config.accumulate:
            return
        step, last = trainer.global_step, trainer.global_step == self.config.steps
        row: dict[str, float] = {}
        if step % self.config.log_every == 0 or step == 1 or last:
            row = {f"train/{k}": v for k, v in pl_module.step_metrics().items()}
            if not np.isfinite(row["train/loss"]):
                raise UserError(
                    f"the loss must be finite, got {row['train/loss']} at step {step}; lower training.lr and "
                    f"re-run the command."
                )
        if not last and self._is_preempted(trainer, step):
            self.preempted = trainer.should_stop = True
        saves = last or self.preempted or step % self.config.checkpoint_every == 0
        if saves:
            _require_finite(pl_module.model, step)
        if self.evaluate and (last or (self.config.eval_every and step % self.config.eval_every == 0)):
            pl_module.gather(self.model)
            if trainer.is_global_zero:
                pl_module.eval()
                self.model.eval()
                with torch.no_grad():
                    row |= self.evaluate(last)
                pl_module.train()
        if row and trainer.is_global_zero:
            self._report(trainer, row, step)
        if saves:
            older = saved_steps(self.folder.parent)
            trainer.save_checkpoint(self.folder / f"step={step:08d}", weights_only=False)
            if trainer.is_global_zero:
                for path in older:
                    shutil.rmtree(path, ignore_errors=True)

    def _is_preempted(self, trainer: pl.Trainer, step: int) -> bool:
        """Return whether any process received the signal to stop; the same in all processes."""
        if trainer.world_size == 1:
            return preemption.requested()
        due = step % _STEPS_PER_CHECK == 0  # the result waits for the device
        return due and trainer.strategy.reduce_boolean_decision(preemption.requested(), all=False)

    def _report(self, trainer: pl.Trainer, row: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(row, step)
        if not trainer.progress_bar_callback:
            rate = (step - self.began_step) / max(time.monotonic() - self.began, 1e-9)
            left = timedelta(seconds=round((self.config.steps - step) / max(rate, 1e-9)))
            numbers = " | ".join(f"{k} {v:.4g}" for k, v in row.items())
            log.info("step %d/%d | %s | %.1f steps/s | eta %s", step, self.config.steps, numbers, rate, left)


def _require_finite(model: nn.Module, step: int) -> None:
    """Raise a UserError if training has diverged."""
    for name, tensor in model.state_dict().items():
        shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if shard.is_floating_point() and not shard.isfinite().all():
            raise UserError(
                f"the weights must be finite, got NaN or infinity in {name!r} at step {step}; lower "
                f"training.lr and re-run the command."
            )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step="))


def _same(batch: Any) -> Any:
    return batch
