"""A script that trains a toy model: `python distributed_training.py OUT STRATEGY DEVICES STEPS ACCUMULATE`.

It imports nothing but the training loop, because every process that training starts runs it, too.
"""

import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from latentact.training.fit import fit
from latentact.training.settings import TrainingConfig


class Batch:
    def __init__(self, positions):
        self.positions = positions

    def to(self, device):
        return self


class Positions(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitems__(self, positions):
        return Batch(torch.tensor(positions))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        return x + self.net(x)


class Toy(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.last = (
            nn.Linear(1, 8),
            nn.ModuleList([Block(), Block()]),
            nn.Linear(8, 1),
        )

    def loss(self, batch):
        x = batch.positions.float()[:, None] / 100
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden)
        return (self.last(hidden) - x.sin()).square().mean(), {}

    def total(self):
        return sum(parameter.sum().item() for parameter in self.parameters())

    def parameter_groups(self):
        return [{"params": [*self.last.parameters()], "lr_factor": 0.5, "weight_decay": 0.0}]


def settings(strategy, devices, steps, accumulate):
    return TrainingConfig(
        steps=steps,
        batch_size=8,
        checkpoint_every=3,
        log_every=1,
        eval_every=2,
        lr=1e-2,
        warmup_steps=1,
        device="cpu",
        precision="32-true",
        strategy=strategy,
        devices=devices,
        accumulate=accumulate,
    )


def main(out, strategy, *numbers):
    model = Toy()

    def evaluate(last):
        checkpoint = Path(out) / "checkpoints/step=00000003"
        if checkpoint.exists() and not last and not (Path(out) / "kept").exists():  # the test resumes from it
            shutil.copytree(checkpoint, Path(out) / "kept/step=00000003")
        return {"val/sum": model.total()}

    fit(model, Positions(), settings(strategy, *map(int, numbers)), Path(out), evaluate)
    torch.save(model.state_dict(), Path(out) / "weights.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
