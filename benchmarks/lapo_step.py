"""Benchmark a LAPO training step at the published sizes: plain against ours, same weights and batches.

Plain: fp32, NCHW, the latent repeated over all pixels before the convolution, as in LAPO's published code.
Ours: as in `latentact train-lam`. Each runs in its own process, since `train-lam` makes the C library keep
freed memory; their steps alternate, so that drift of the machine's speed affects both alike.

    python benchmarks/lapo_step.py [--batch-size 128] [--steps 50]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentact.device import keep_freed_memory
from latentact.lams.models.lapo import LapoConfig
from latentact.nn import unet
from latentact.nn.impala import Impala
from latentact.training.settings import TrainingConfig, get_precision
from latentact.types import Clip


def repeated(conv: nn.Conv2d, x: Tensor, latent: Tensor) -> Tensor:
    """Convolve the latent at full resolution, as published."""
    return conv(torch.cat([x, latent[:, :, None, None].expand(-1, -1, *x.shape[-2:])], dim=1))


def as_given(self: Impala, x: Tensor) -> Tensor:
    """Return the features in the memory layout of the input, as published."""
    return F.relu(self.fc(F.relu(self.conv_stack(x).flatten(1))))


def batches(steps: int, size: int) -> list[Clip]:
    """Return batches of smooth images with a moving block."""
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


def work(pipe: Connection, ours: bool, steps: int, size: int) -> None:
    """Run a training step for each message of the pipe, and reply with its loss and seconds."""
    torch.manual_seed(0)
    model = LapoConfig().build().train()
    if ours:
        keep_freed_memory()
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        unet._conv_with_constant, Impala.forward = repeated, as_given
        unet._upsampled = unet._flattened = nn.Module.__call__
    bf16 = ours and get_precision(TrainingConfig()) == "bf16-mixed"
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=ours)
    for number, clip in enumerate(batches(steps, size)):
        if not ours:
            clip = Clip(frames=clip.frames.contiguous(), valid=clip.valid, index=clip.index)
        pipe.recv()
        begun = time.perf_counter()
        optimizer.param_groups[0]["lr"] = float(np.interp(number, [0, 50, 50_001], [0.1, 1, 0.01])) * 3e-4
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = model.loss(clip)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        pipe.send((loss.item(), time.perf_counter() - begun))


def main() -> None:
    """Print both sides' losses and times, and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes = []
    for ours in (False, True):
        parent, child = context.Pipe()
        context.Process(target=work, args=(child, ours, args.steps, args.batch_size), daemon=True).start()
        child.close()
        pipes.append(parent)
    results: list[list[tuple[float, float]]] = [[], []]
    for number in range(args.steps):
        for pipe, rows in zip(pipes, results, strict=True):
            pipe.send(number)
            rows.append(pipe.recv())
        if number % 10 == 0 or number == args.steps - 1:
            print(f"step {number}: plain {results[0][-1][0]:.5f}  ours {results[1][-1][0]:.5f}", flush=True)
    slow, quick = ([seconds for _, seconds in rows[1:] or rows] for rows in results)
    ratio = statistics.median(a / b for a, b in zip(slow, quick, strict=True))
    print(
        f"plain fp32 {statistics.median(slow):.3f} s/step, ours {statistics.median(quick):.3f} s/step, "
        f"ratio {ratio:.2f} (median of pairs)"
    )
    late = [statistics.mean(loss for loss, _ in rows[-10:]) for rows in results]
    print(f"losses of the last ten steps differ by {abs(late[1] / late[0] - 1):.2%}")


if __name__ == "__main__":
    main()
