"""Training step and labeling of the full-size models here: rates, memory, share of the matrix rate.

Random weights of the published sizes. A training step is loss, backward pass, clipping and AdamW, on as many
clips as --batch; labeling is `encode` of a clip of 64 frames. The share is the work of the matrix
products and convolutions per second, divided by what a large product of the same precision reaches here.
Each row is written at once into the machine's section of the page; other rows and sections stay.

    python benchmarks/lam_speed.py [--device cpu] [--models lapo laq villa_x] [--compile] [--repeats 3]
"""

from __future__ import annotations

import argparse
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentact.device import keep_freed_memory, supports_int8
from latentact.io.atomic import atomic_write
from latentact.lams.models.lapo import LapoConfig
from latentact.lams.models.laq import LaqConfig
from latentact.lams.models.villa_x import VillaXConfig
from latentact.nn.int8 import int8
from latentact.training.loop import compiled as compiled_loss
from latentact.types import Clip

CONFIGS: dict[str, Any] = {
    "lapo": LapoConfig(),
    "laq": LaqConfig(),
    "villa_x": VillaXConfig(window="chunked"),
}
BATCH = {"cpu": {"lapo": 32, "laq": 2, "villa_x": 1}, "cuda": {"lapo": 128, "laq": 64, "villa_x": 32}}
"""Clips of a training step."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
FRAMES = 64
HEAD = """# Speed of the full-size models

Measured by `python benchmarks/lam_speed.py` with random weights of the published sizes. Step: loss, backward
pass, gradient clipping and AdamW. Labeling: `encode` of a clip of 64 frames (villa-X with `window=chunked`);
int8 as with `--precision int8`. Of peak: throughput of matrix products and convolutions divided by that of
one large matrix product on the same machine in the same precision (convolutions can be faster). Memory: peak
memory of the process, including the model.
"""


def main() -> None:
    """Measure every row in a process of its own and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page", default="docs/performance.md")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        model, precision, compiled = options.row
        print(_row(model, precision, compiled, options.device, options.repeats))
        return
    for model in options.models:
        for precision in PRECISIONS:
            if precision == "int8" and not supports_int8(options.device):
                continue
            for compiled in ("no", "yes") if options.compile and precision != "int8" else ("no",):
                words = ["--device", options.device, "--repeats", str(options.repeats)]
                command = [sys.executable, __file__, *words, "--row", model, precision, compiled]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                row = done.stdout.strip().splitlines()[-1]
                print(row, flush=True)
                _write(Path(options.page), _machine(options.device), row)


def _row(name: str, precision: str, compiled: str, device: str, repeats: int) -> str:
    """Measure one model in one precision; returns a row of the table."""
    keep_freed_memory()
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = config.build().to(device=device, memory_format=torch.channels_last)
    size, batch = model.spec.resolution, BATCH["cuda" if device == "cuda" else "cpu"][name]
    length = model.context + 1 + model.horizon
    clip = Clip(
        frames=torch.randint(0, 256, (batch, length, 3, size, size), dtype=torch.uint8, device=device),
        valid=torch.ones(batch, length, dtype=torch.bool, device=device),
        index=torch.arange(batch, device=device),
    )
    video = torch.randint(0, 256, (1, FRAMES, 3, size, size), dtype=torch.uint8, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    compiling = torch.compile if compiled == "yes" else lambda function: function
    labels = int8(model) if precision == "int8" else model
    loss = compiled_loss(model.loss) if compiled == "yes" else model.loss
    encode = compiling(labels.encode)
    peak = _peak(device, PRECISIONS[precision])

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            error, _ = loss(clip)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()

    def label() -> None:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision != "fp32"):
            encode(video)

    step_cells = ("", "")
    if precision != "int8":
        model.train()
        step_s = _seconds(step, repeats, device)
        step_work = _work(lambda: model.loss(clip)[0].backward(), device)
        step_cells = f"{step_s:.3g} s", f"{step_work / step_s / peak:.0%}"
    model.eval().requires_grad_(False)
    labels.eval()
    label_s, label_work = (
        _seconds(label, repeats, device),
        _work(torch.no_grad()(lambda: model.encode(video)), device),
    )
    on_cpu = device == "cpu"
    held = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if on_cpu
        else torch.cuda.max_memory_allocated()
    )
    cells = (
        *(name, precision, compiled, str(batch), *step_cells),
        *(f"{(FRAMES - 1) / label_s:.3g}", f"{label_work / label_s / peak:.0%}", f"{held / 2**30:.1f} GiB"),
    )
    return f"| {' | '.join(cells)} |"


def _seconds(work: Callable[[], None], repeats: int, device: str) -> float:
    """Return the median time of a call, after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def _work(call: Callable[[], Any], device: str) -> float:
    """Return the floating point operations of a call that count as matrix work."""
    with FlopCounterMode(display=False) as counter, torch.autocast(device, torch.bfloat16):
        call()
    return counter.get_total_flops()


def _peak(device: str, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    multiply = torch.ops.aten._int_mm if dtype == torch.int8 else torch.mm
    times = [_seconds(lambda: multiply(a, b), 1, device) for _ in range(20)]  # type: ignore[arg-type, return-value]
    return 2 * side**3 / min(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    flags = [
        flag for flag in ("amx_bf16", "avx512_bf16") if info.is_file() and f" {flag} " in info.read_text()
    ]
    machine = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} cores"
    return f"{machine}, {flags[0] if flags else 'no native bf16'}"


def _write(page: Path, machine: str, row: str) -> None:
    """Write a row into the machine's section of the page, replacing an older one of the same case."""
    names = ("model", "precision", "compiled", "clips", "step", "of peak", "labeled/s", "of peak", "memory")
    parts = re.split(r"^## ", page.read_text() if page.is_file() else HEAD, flags=re.MULTILINE)[1:]
    mine = next((part for part in parts if part.splitlines()[0] == machine), "")
    kept = [line for line in mine.splitlines() if line.startswith(tuple(f"| {name} " for name in CONFIGS))]
    rows = {tuple(line.split(" | ")[:3]): line for line in [*kept, row]}
    table = [f"| {' | '.join(names)} |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    table += sorted(rows.values(), key=lambda line: [*CONFIGS].index(line.split(" | ")[0].removeprefix("| ")))
    sections = [part for part in parts if part != mine] + [f"{machine}\n\n" + "\n".join(table) + "\n"]
    with atomic_write(page) as partial:
        partial.write_text("\n## ".join([HEAD.rstrip() + "\n", *(each.rstrip() + "\n" for each in sections)]))


if __name__ == "__main__":
    main()
