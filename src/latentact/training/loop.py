"""The training loop of every model: Lightning with deterministic steps, exact resume, `metrics.csv`.

Batch and random numbers of a step are functions of (seed, step), so that a killed run that goes on from its
last checkpoint ends with the same weights as an undisturbed one.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset

from latentact.device import keep_freed_memory
from latentact.errors import UserError
from latentact.training.checkpoint_io import FolderCheckpointIO
from latentact.training.metrics_csv import MetricsCsv
from latentact.training.run_folder import Busy, saved_steps
from latentact.training.settings import TrainingConfig, precision

log = logging.getLogger(__name__)
for _name in ("lightning.pytorch", "lightning.fabric"):  # greetings; what matters is raised or logged here
    logging.getLogger(_name).setLevel(logging.ERROR)


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainingConfig,
    out: Path,
    evaluate: Callable[[bool], dict[str, float]] | None,
) -> None:
    """Do what `training.fit.fit` promises."""
    checkpoints = out / "checkpoints"
    newest = max(saved_steps(out), default=None, key=_step_of)
    start = _step_of(newest) if newest else 0
    if newest:
        log.info("going on from step %d of %s", start, out)
    world = config.devices * config.num_nodes
    loader = DataLoader(
        data,
        batch_sampler=_Steps(len(data), config, start, world),  # type: ignore[arg-type]
        collate_fn=_same,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
    )
    loggers: list[Any] = [MetricsCsv(out, start), TensorBoardLogger(out, name="tensorboard", version="")]
    if config.wandb:
        loggers.append(WandbLogger(project="latentact", name=out.name, save_dir=out))
    terminal = Console(stderr=True).is_terminal
    trainer = pl.Trainer(
        accelerator=config.device,
        devices=config.devices,
        num_nodes=config.num_nodes,
        precision=precision(config),  # type: ignore[arg-type]
        max_steps=config.steps,
        max_epochs=-1,
        gradient_clip_val=config.grad_clip or None,
        logger=loggers,
        callbacks=[_Progress(config, checkpoints, evaluate), *([RichProgressBar()] if terminal else [])],
        plugins=[FolderCheckpointIO()],
        default_root_dir=out,
        enable_checkpointing=False,
        enable_progress_bar=terminal,
        enable_model_summary=False,
        log_every_n_steps=config.log_every,
        use_distributed_sampler=False,
    )
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            for leftover in checkpoints.glob(".*.partial"):
                shutil.rmtree(leftover)
            trainer.fit(_Module(model, config), loader, ckpt_path=newest)  # loads it also when all is done
    except Timeout as error:
        raise Busy(f"another process is training in {out}; wait for it, or give another out=.") from error
    except SystemExit as stopped:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stopped
    model.eval()


class _Module(pl.LightningModule):
    """Loss, optimizer and schedule for Lightning."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = config
        loss: Any = model.loss
        self.compute = torch.compile(loss) if config.compile else loss

    def on_train_start(self) -> None:
        # A fused optimizer reads its state in the memory layout of the parameters; a checkpoint has lost it.
        for parameter, state in self.trainer.optimizers[0].state.items():
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.config.seed * 1_000_003 + self.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss, metrics = self.compute(batch)
        return {"loss": loss, "metrics": metrics}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(str(device))

    def configure_optimizers(self) -> Any:
        c = self.config

        def factor(step: int) -> float:
            return float(
                np.interp(step, [0, min(c.warmup_steps, c.steps - 1), c.steps + 1], [0.1, 1.0, 0.01])
            )

        fused = c.precision != "16-mixed"  # whose loss scale a fused step undoes only after clipping
        optimizer = torch.optim.AdamW(self.model.parameters(), c.lr, weight_decay=c.weight_decay, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        # Lightning's own refuses fused optimizers, for the sake of loss scaling.
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)


class _Steps:
    """Endless batches of positions; each is a function of (seed, step), cut between ranks."""

    def __init__(self, length: int, config: TrainingConfig, start: int, world: int) -> None:
        self.length, self.config, self.start, self.world = length, config, start, world

    def __iter__(self) -> Iterator[list[int]]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        step = self.start
        while True:
            rng = np.random.default_rng((self.config.seed, step))
            yield rng.integers(self.length, size=self.config.batch_size)[rank :: self.world].tolist()
            step += 1


class _Progress(pl.Callback):
    """Metrics rows, plain progress lines, evaluations and checkpoints at their steps."""

    def __init__(
        self, config: TrainingConfig, folder: Path, evaluate: Callable[[bool], dict[str, float]] | None
    ) -> None:
        self.config, self.folder, self.evaluate = config, folder, evaluate
        self.began = self.began_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began, self.began_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = trainer.global_step, trainer.global_step == self.config.steps
        row: dict[str, float] = {}
        if step % self.config.log_every == 0 or step == 1 or last:
            row["train/loss"] = outputs["loss"].item()
            row |= {f"train/{k}": v.item() for k, v in outputs["metrics"].items()}
            if not np.isfinite(row["train/loss"]):
                raise UserError(
                    f"the loss must be finite, got {row['train/loss']} at step {step}; lower training.lr and "
                    f"run again."
                )
        saves = last or step % self.config.checkpoint_every == 0
        if saves:
            _require_finite(pl_module.model, step)
        if self.evaluate and (last or (self.config.eval_every and step % self.config.eval_every == 0)):
            pl_module.eval()
            with torch.no_grad():
                row |= self.evaluate(last)
            pl_module.train()
        if row:
            self._report(trainer, row, step)
        if saves:
            older = saved_steps(self.folder.parent)
            trainer.save_checkpoint(self.folder / f"step={step:08d}", weights_only=False)
            for path in older:
                trainer.strategy.remove_checkpoint(path)

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
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"the weights must be finite, got others in {name!r} at step {step}; lower training.lr and "
                f"run again."
            )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step="))


def _same(batch: Any) -> Any:
    return batch
