"""What every test gets: a cache of its own, a small dataset with known actions, and the real command line."""

from __future__ import annotations

import ctypes.util
import gc
import hashlib
import io
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hydra.core.config_store import ConfigStore

import latentact.io.atomic  # what is imported below must not be the first to import this
from workers import PRODUCT

gc.disable()  # until the tests are collected, since imports leave no garbage

# Runtime type checks would refuse Typer's context, whose class is not the one Typer documents.
with mock.patch.object(sys, "meta_path", [f for f in sys.meta_path if "jaxtyping" not in type(f).__module__]):
    from latentact.cli import main

needs_gl = pytest.mark.skipif(
    not (ctypes.util.find_library("EGL") or ctypes.util.find_library("OSMesa")),
    reason="neither EGL nor OSMesa is installed, with which MuJoCo draws without a display",
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start deaf to Ctrl-C


THREADED = ("xland", "procgen")
"""Suites whose libraries have threads that do not survive the forks of other tests."""
OWN_PROCESS = (
    "tests/unit/test_xland.py",
    "tests/unit/test_procgen.py",
    "tests/conformance/test_env_suites.py",
)
"""Files with tests of these suites."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among parallel workers, leave tests with threads to the process that `test_own_process` starts."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        own = [i for i in items if i.nodeid.startswith(OWN_PROCESS) and any(s in i.nodeid for s in THREADED)]
        items[:] = [item for item in items if item not in own]


def pytest_collection_finish() -> None:
    """Collect garbage from here on, apart from what is imported."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # as the command line's
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTACT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _composed_once() -> Iterator[None]:
    """Compose settings once per command: Hydra does so twice, first only to read `hydra.mode`. And do not
    copy all registered settings for it, which it does not change.

    Processes that tests start are not affected.
    """
    with (
        mock.patch("hydra._internal.hydra.Hydra.get_mode", return_value=None),
        mock.patch.object(ConfigStore, "__deepcopy__", lambda store, _: store, create=True),
    ):
        yield


@pytest.fixture(autouse=True, scope="session")
def _features_set_one_by_one() -> Iterator[None]:
    """Set a column of `datasets.Features` in constant time, not in time proportional to all columns: LeRobot
    sets more than a hundred several times whenever it opens a dataset."""
    try:
        from datasets.features.features import Features, require_decoding
    except ImportError:
        yield
        return

    def set_column(features: Features, name: str, feature: Any) -> None:
        dict.__setitem__(features, name, feature)
        features._column_requires_decoding[name] = require_decoding(feature)

    with mock.patch.object(Features, "__setitem__", set_column):
        yield


@pytest.fixture(autouse=True)
def _scheduling() -> Iterator[None]:
    """Undo what the AV1 encoder does for root: LeRobot's writers leave a real-time process."""
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


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


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRODUCT)


def fork(
    function: Callable[..., None], *arguments: Any, log: str | Path = os.devnull, **environment: str
) -> Any:
    """Call a function in a process and session of its own that has most imports behind it.

    Args:
        function: of a module.
        arguments: of the function.
        log: file of its output.
        environment: variables besides this process's.

    Returns:
        The process, as of `multiprocessing`.
    """
    given = (dict(os.environ) | environment, os.getcwd(), str(log))
    process = FORKS.Process(target=_call, args=(function, arguments, *given))
    process.start()
    return process


def _call(function: Any, arguments: Any, environment: dict[str, str], folder: str, log: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*arguments)


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Run Python code as `fork` does, with the folders of `PYTHONPATH`, and return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = fork(_python, code, arguments, log=log, **environment)
        process.join()
        printed = log.read_text()
    assert process.exitcode == 0, printed[-3000:]
    return printed


def _python(code: str, arguments: tuple[str, ...]) -> None:
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["-c", *arguments]
    logging.getLogger().handlers.clear()  # of what is imported already
    exec(code, {"__name__": "__main__"})


def start(*arguments: str | Path, log: str | Path = os.devnull, **environment: str) -> Any:
    """Start the command line as `fork` does."""
    return fork(_command, *map(str, arguments), log=log, **environment)


def _command(*arguments: str) -> None:
    logging.getLogger().handlers.clear()  # of what is imported already
    sys.argv = ["latentact", *arguments]
    main()


def ranks(count: int) -> list[dict[str, str]]:
    """Return the environment of each of the processes that torchrun would start on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
        "GROUP_RANK": "0",
    }
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [shared | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


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


def ok(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def refused(*arguments: Any) -> str:
    """Run a command that must end with exit code 2, and return its one sentence."""
    done = cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a folder by its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
