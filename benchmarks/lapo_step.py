"""One LAPO training step at the published sizes: the plain way beside ours, same weights, same batches.

Plain: fp32, NCHW, the latent repeated over the whole picture and convolved there, as LAPO's published code
does. Ours: what `latentact train-lam` runs. Steps alternate, so that a machine whose speed drifts treats both
alike.

    python benchmarks/lapo_step.py [--batch-size 128] [--steps 50]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentact.lams.lapo import Lapo, LapoConfig
from latentact.nn import unet
from latentact.nn.impala import Impala
from latentact.training.fit import TrainingConfig, keep_freed_memory, precision
from latentact.types import Clip


def repeated(conv: nn.Conv2d, x: Tensor, latent: Tensor) -> Tensor:
    """Convolve the latent at full resolution, as published."""
    return conv(torch.cat([x, latent[:, :, None, None].expand(-1, -1, *x.shape[-2:])], dim=1))


def as_given(self: Impala, x: Tensor) -> Tensor:
    """Return the features in the memory layout that the input has, as published."""
    return F.relu(self.fc(F.relu(self.conv_stack(x).flatten(1))))


def batches(steps: int, size: int) -> list[Clip]:
    """Smooth pictures in which a block moves."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(steps):
        frames = (
            rng.integers(0, 256, (size, 1, 8, 8, 3), dtype=np.uint8).repeat(8, 2).repeat(8, 3).repeat(3, 1)
        )
        for i, (y, x) in enumerate(rng.integers(0, 40, (size, 2))):
            for t in range(3):
                frames[i, t, y + 4 * t : y + 4 * t + 12, x : x + 12] = 255
        video = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)
        valid = torch.ones(size, 3, dtype=torch.bool)
        found.append(Clip(frames=video, valid=valid, index=torch.arange(size)))
    return found


class Trainee:
    """A model with its optimiser, stepped and timed."""

    def __init__(self, model: Lapo, ours: bool) -> None:
        self.model, self.ours = model.train(), ours
        if ours:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.bf16 = ours and precision(TrainingConfig()) == "bf16-mixed"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-4)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, clip: Clip, number: int) -> None:
        """Run one training step on a clip."""
        unet._conv_with_constant = OURS if self.ours else repeated
        Impala.forward = OUR_FORWARD if self.ours else as_given
        if not self.ours:
            clip = Clip(frames=clip.frames.contiguous(), valid=clip.valid, index=clip.index)
        begun = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = (
            float(np.interp(number, [0, 50, 50_001], [0.1, 1, 0.01])) * 3e-4
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss, _ = self.model.loss(clip)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begun)


OURS, OUR_FORWARD = unet._conv_with_constant, Impala.forward


def main() -> None:
    """Print both sides' losses and times, and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()
    model = LapoConfig().build()
    plain, ours = Trainee(copy.deepcopy(model), ours=False), Trainee(model, ours=True)
    for number, clip in enumerate(batches(args.steps, args.batch_size)):
        plain.step(clip, number)
        ours.step(clip, number)
        if number % 10 == 0 or number == args.steps - 1:
            print(f"step {number}: plain {plain.losses[-1]:.5f}  ours {ours.losses[-1]:.5f}", flush=True)
    times = [statistics.median(side.seconds[1:] or side.seconds) for side in (plain, ours)]
    ratio = statistics.median(a / b for a, b in zip(plain.seconds[1:], ours.seconds[1:], strict=True))
    print(
        f"plain fp32 {times[0]:.3f} s/step, ours {times[1]:.3f} s/step, ratio {ratio:.2f} (median of pairs)"
    )
    late = [statistics.mean(side.losses[-10:]) for side in (plain, ours)]
    print(f"losses of the last ten steps differ by {abs(late[1] / late[0] - 1):.2%}")


if __name__ == "__main__":
    main()
