"""Benchmark augmentation: its share of a training step of the smallest recipes.

Augmentation and steps take turns, so that drift of the machine's speed affects both alike.

    python benchmarks/augment_step.py [--batch-size 64] [--steps 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from latentact.data.samples import PolicyBatch
from latentact.data.transforms import AugmentConfig, augment_batch
from latentact.device import keep_freed_memory, supports_bf16
from latentact.lams.models.lapo import LapoConfig
from latentact.policies.bc import BcConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, robot_action_target
from latentact.quantizers.none import WhitenedConfig
from latentact.types import ActionSpace, Clip

SIZE = 56
KINDS = {
    "shift": AugmentConfig(shift=4),
    "shift and colors": AugmentConfig(shift=4, brightness=0.2, contrast=0.2, saturation=0.2),
    "everything": AugmentConfig(shift=4, brightness=0.2, contrast=0.2, saturation=0.2, blur=0.5, cutout=0.3),
}


def frames(batch: int, steps: int) -> torch.Tensor:
    """Return random frames in the layout of the cache."""
    return torch.randint(256, (batch, steps, SIZE, SIZE, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)


def policy(batch: int) -> tuple[nn.Module, Any]:
    """Return the policy of `experiment=babyai` and a batch."""
    space = ActionSpace(kind="discrete", size=7)
    spec = PolicySpec(resolution=SIZE, target=robot_action_target(space, "bc"), action_space=space)
    model = BcConfig(network=NetworkConfig(backbone="patch", channels=(64,))).build(spec)
    target, mask = torch.zeros(batch, 1, 1, dtype=torch.long), torch.ones(batch, 1, dtype=torch.bool)
    words = torch.zeros(batch, 0)
    return model, PolicyBatch(frames=frames(batch, 1), state=None, words=words, target=target, mask=mask)


def lam(batch: int) -> tuple[nn.Module, Any]:
    """Return the latent action model of `experiment=babyai` and a batch."""
    config = LapoConfig(backbone="patch", size=SIZE, bottleneck=WhitenedConfig(dim=8), difference_input=2.0,
                        fdm_context=0, motion_weight=50.0)  # fmt: skip
    valid = torch.ones(batch, 3, dtype=torch.bool)
    return config.build(), Clip(frames=frames(batch, 3), valid=valid, index=torch.arange(batch))


def main() -> None:
    """Time both models and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args()
    rng = np.random.default_rng(0)
    keep_freed_memory()  # as in training
    for name, make in (("policy", policy), ("LAM", lam)):
        model, batch = make(flags.batch_size)
        model = model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step(model: Any = model, batch: Any = batch, optimizer: Any = optimizer) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=supports_bf16("cpu")):
                loss, _ = model.loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        work: dict[str, Callable[[], Any]] = {"step": step}
        work |= {
            kind: lambda config=config, batch=batch: augment_batch(batch, config, rng)
            for kind, config in KINDS.items()
        }
        times: dict[str, list[float]] = {kind: [] for kind in work}
        for _ in range(flags.steps):
            for kind, run in work.items():
                start = time.perf_counter()
                run()
                times[kind].append(time.perf_counter() - start)
        plain = statistics.median(times.pop("step"))
        print(f"{name}: step {1000 * plain:.1f} ms")
        for kind, seconds in times.items():
            took = statistics.median(seconds)
            print(f"  {kind}: {1000 * took:.1f} ms, {100 * took / plain:.1f} % of the step")


if __name__ == "__main__":
    main()
