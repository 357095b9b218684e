"""Settings of training, for every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from latentact.data.transforms import AugmentConfig
from latentact.device import memory_bytes, require_device, supports_bf16
from latentact.errors import UserError, require_between, require_one_of

STRATEGIES = ("auto", "ddp", "fsdp")
LR_SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
_MOST_STEPS = 10**9
RANGES = {
    "steps": (1, _MOST_STEPS),
    "checkpoint_every": (1, _MOST_STEPS),
    "log_every": (1, _MOST_STEPS),
    "warmup_steps": (0, _MOST_STEPS),
    "eval_every": (0, _MOST_STEPS),
    "batch_size": (1, 1 << 16),
    "accumulate": (1, 1 << 16),
    "lr": (0, 100),
    "final_lr_factor": (0, 1),
    "weight_decay": (0, 100),
    "grad_clip": (0, 1e9),
    "seed": (0, 2**31 - 1),
    "devices": (1, 1024),
    "num_nodes": (1, 4096),
    "num_workers": (0, 1024),
}
"""Minimum and maximum of each number."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of training."""

    FOLLOWS: ClassVar = {
        "devices": "cluster.compute.gpus_per_node",
        "num_nodes": "cluster.compute.num_nodes",
    }
    """Setting -> setting of the stage that gives its default on the command line."""

    steps: int = 50_000
    """Optimizer steps."""
    batch_size: int = 128
    """Samples per step, over all devices together."""
    accumulate: int = 1
    """Slices of a step's batch that are processed one after another and whose gradients are averaged: less
    memory, the same batches. Where a loss averages over valid elements, each slice averages over its own."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of its averages of gradients and of their squares."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    grad_clip: float = 2.0
    """Maximum gradient norm; 0: no clipping."""
    warmup_steps: int = 50
    """Steps of linear warmup from 0.1 of the peak learning rate; decay follows."""
    final_lr_factor: float = 0.01
    """Final learning rate as a fraction of the peak; 1: constant."""
    lr_schedule: str = "linear"
    """Decay of the learning rate after the warmup: linear, cosine, or constant (none)."""
    precision: str = "auto"
    """auto: bf16 where the hardware supports it natively, else fp32; or bf16-mixed, 32-true, 16-mixed."""
    seed: int = 0
    """Seed of weights, batches and noise."""
    checkpoint_every: int = 500
    """Steps between training checkpoints; the newest is kept."""
    log_every: int = 50
    """Steps between rows of metrics.csv."""
    eval_every: int = 500
    """Steps between evaluations on held-out episodes; 0 evaluates at the end only."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    devices: int = 1
    """Devices per node; by default cluster.compute.gpus_per_node."""
    num_nodes: int = 1
    """Machines; by default cluster.compute.num_nodes."""
    strategy: str = "auto"
    """auto: one process, or ddp with several devices; ddp: the whole model on every device; fsdp: weights,
    gradients and optimizer state in shards."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the observations; evaluation has none."""
    num_workers: int = 0
    """Data loader processes; the memory-mapped store rarely needs any."""
    compile: bool = False
    """Whether to run the loss through torch.compile; not with strategy=fsdp."""
    smoke_test: bool = False
    """Whether to take two steps only, to see that everything works."""
    wandb: bool = False
    """Whether to log to Weights & Biases in addition to TensorBoard and metrics.csv."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        for name, (low, high) in RANGES.items():
            require_between(f"training.{name}", getattr(self, name), low, high)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"training.betas must be two numbers of at least 0 and below 1, got {self.betas}."
            )
        if not self.lr:
            raise UserError("training.lr must be more than 0, got 0. Give a learning rate such as 3e-4.")
        require_one_of("training.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        require_one_of("training.precision", self.precision, PRECISIONS)
        require_one_of("training.strategy", self.strategy, STRATEGIES)
        slices = self.accumulate * self.devices * self.num_nodes
        if self.batch_size % slices:
            raise UserError(
                f"training.batch_size must be a multiple of accumulate x devices x num_nodes ({slices}), got "
                f"{self.batch_size}."
            )
        if self.compile and self.strategy == "fsdp":
            raise UserError("training.compile must be false with strategy=fsdp, got true. Use strategy=ddp.")
        if self.device != "auto":
            require_device(self.device)

    @property
    def plain(self) -> TrainingConfig:
        """These settings without augmentation, for training on features and latent actions."""
        return replace(self, augment=AugmentConfig())


_BYTES_PER_PARAMETER = {"cpu": 28, "cuda": 16}
"""fp32 weights, gradients and AdamW's two averages; on a CPU also the copy for a checkpoint."""


def require_trainable_size(build: Callable[[], nn.Module], name: str, device: str) -> None:
    """Raise a UserError if a model is too large to train in memory, before any memory is allocated.

    Args:
        build: builds the model; called with torch's meta device as the default.
        name: name of the model, for messages.
        device: device to train it on; auto: torch's choice.
    """
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build().parameters())
    kind = "cuda" if device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    most = memory_bytes(kind) // _BYTES_PER_PARAMETER[kind]
    if count > most:
        raise UserError(
            f"{name} must have at most {most:,} parameters to be trained in the memory of this machine, got "
            f"{count:,}."
        )


def get_precision(config: TrainingConfig) -> str:
    """Return the training precision under Lightning's name."""
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if supports_bf16(config.device) else "32-true"
