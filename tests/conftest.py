"""What every test gets: a cache of its own, a small dataset with known actions, and the real command line."""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import latentact.io.atomic  # what is imported below must not be the first to import this

# Runtime type checks would refuse Typer's context, whose class is not the one Typer documents.
with mock.patch.object(sys, "meta_path", [f for f in sys.meta_path if "jaxtyping" not in type(f).__module__]):
    from latentact.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start deaf to Ctrl-C


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTACT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def write_blocks(path: Path, episodes: int = 8, steps: int = 12, size: int = 32, seed: int = 0) -> Path:
    """Write an npz dataset of a bright block that moves left, right, up or down by its action, two pixels a
    step."""
    rng = np.random.default_rng(seed)
    moves = np.array([(0, -4), (0, 4), (-4, 0), (4, 0)])
    frames, actions, done = [], [], []
    for _ in range(episodes):
        place = rng.integers(8, size - 16, size=2) // 4 * 4
        for step in range(steps):
            action = int(rng.integers(4))
            picture = np.full((size, size, 3), 30, np.uint8)
            picture[place[0] : place[0] + 8, place[1] : place[1] + 8] = (250, 200, 60)
            frames.append(picture)
            actions.append(action)
            done.append(step == steps - 1)
            place = np.clip(place + moves[action], 0, size - 8)
    np.savez(path, obs=np.stack(frames), action=np.array(actions), done=np.array(done), fps=10)
    return path


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An npz dataset of 8 episodes of a block that moves by four actions, 32x32 pixels, 10 fps."""
    return write_blocks(tmp_path_factory.mktemp("blocks") / "blocks.npz")


TINY_LAM = (
    *("lam.backbone=patch", "lam.size=32", "lam.patch=4", "lam.idm_channels=[16]", "lam.fdm_channels=[16]"),
    *("lam.bottleneck.kind=none", "lam.bottleneck.dim=4", "data.resolution=32"),
    *("training.steps=30", "training.batch_size=16", "training.checkpoint_every=10", "training.log_every=10"),
)
TINY_POLICY = (
    *("policy.network.backbone=patch", "policy.network.patch=4", "policy.network.channels=[16]"),
    *("training.steps=30", "training.batch_size=16", "training.checkpoint_every=10", "training.log_every=10"),
)
"""Settings of train-lam and train-policy that run in a second on `blocks`."""


def latentact(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Run the real command line in a process of its own."""
    command = [sys.executable, "-m", "latentact", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line inside this process, which saves the seconds that a new one takes to start."""
    typed = ["latentact", *map(str, arguments)]
    out, err, code, root = io.StringIO(), io.StringIO(), 0, logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", typed):
            main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return subprocess.CompletedProcess(typed, code, out.getvalue(), err.getvalue())
