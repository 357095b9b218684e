"""`label --engine`: every engine writes the same bytes, also after a process was killed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from conftest import cli, contents, fork, ranks, start, write_blocks
from latentact.lams.models.villa_x import VillaXConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 episodes of 41 frames: 20 units of one episode each."""
    return write_blocks(tmp_path_factory.mktemp("data") / "blocks.npz", episodes=20, steps=41)


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    """A model that looks at the frames before a transition, and has codes."""
    torch.manual_seed(0)
    small = {"encoder_depth": 1, "encoder_embed_dim": 32, "encoder_n_heads": 2, "map_heads": 2}
    model = VillaXConfig(resolution=28, d_t=4, decoder=False, **small).build()
    assert model.context > 0
    model.save_pretrained(tmp_path_factory.mktemp("lam") / "lam")
    return tmp_path_factory.getbasetemp() / "lam0/lam"


@pytest.fixture
def label(data, lam, tmp_path, monkeypatch):
    """The command, with a cache of its own."""
    monkeypatch.setenv("LATENTACT_CACHE", str(tmp_path / "cache"))
    return ("label", "--lam", lam, "--data", data, "--batch-size", "64", "--out", tmp_path / "out")


@pytest.fixture(scope="module")
def whole(data, lam, tmp_path_factory):
    """Labels of the local engine."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTACT_CACHE", str(out / "cache"))
        done = cli("label", "--lam", lam, "--data", data, "--batch-size", "64", "--out", out / "out")
    assert done.returncode == 0, done.stderr
    assert "h of video in" in done.stderr
    assert "per hour of video" in done.stderr
    return contents(out / "out")


def _main(*arguments):
    from latentact.cli import main
    from latentact.labeling.engines import torchrun

    torchrun.GRACE_S = 2
    sys.argv = ["latentact", *map(str, arguments)]
    main()


def _dies(*arguments):
    """Kill this process when it has written a unit."""
    from latentact.progress import Progress

    own, cache = Progress.advance, Path(os.environ["LATENTACT_CACHE"])

    def advance(progress, steps):
        own(progress, steps)
        if [*cache.glob("tokens/*.partial/*[13579].safetensors")]:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.advance = advance
    _main(*arguments)


def parts(cache: Path) -> int:
    """Return the number of finished units."""
    return len([*cache.glob("tokens/*.partial/*.safetensors")])


def wait(ready, process=None):
    deadline = time.monotonic() + 300
    while not ready():
        assert process is None or process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_two_processes_of_torchrun_write_what_one_writes(label, whole, tmp_path):
    run = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "latentact")
    command = [*run, *map(str, label), "--engine", "torchrun"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == whole
    assert not [*(tmp_path / "cache").glob("tokens/*.partial")]


def test_a_rank_that_dies_is_named_and_its_work_is_done_by_the_next_run(label, whole, tmp_path):
    cache, command = tmp_path / "cache", (*label, "--engine", "torchrun")
    first, second = (
        fork(
            (_main, _dies)[rank],
            *command,
            log=tmp_path / str(rank),
            LATENTACT_CACHE=str(cache),
            SLURM_PROCID=str(rank),
            SLURM_NTASKS="2",
        )
        for rank in range(2)
    )
    second.join()
    first.join()
    assert second.exitcode == -signal.SIGKILL
    assert first.exitcode == 2
    said = (tmp_path / "0").read_text().splitlines()[-1]
    assert said.startswith("error: process 1 of 2 has stopped before its work was done.")
    assert not (tmp_path / "out").exists()
    assert 10 < parts(cache) < 20
    assert cli(*label).returncode == 0
    assert contents(tmp_path / "out") == whole


def test_precompute_has_the_same_engines(data, lam, cluster, tmp_path, monkeypatch):
    given = ("precompute", "--dataset-root", data, "--lam-model-path", lam, "--batch-size", "64")
    command = (*given, "--output", "file", "--output-dir", tmp_path / "out")
    monkeypatch.setenv("LATENTACT_CACHE", str(tmp_path / "cache"))
    assert cli(*given, "--output", "file", "--output-dir", tmp_path / "whole").returncode == 0
    expected = contents(tmp_path / "whole")
    monkeypatch.setenv("LATENTACT_CACHE", str(tmp_path / "other"))
    done = cli(*command, "--engine", "ray", "--ray-actors", "2")
    assert done.returncode == 0, done.stderr
    assert "starting 2 Ray actors" in done.stderr
    assert contents(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")
    third = str(tmp_path / "third")
    shares = [
        fork(
            _main,
            *command,
            "--engine",
            "torchrun",
            log=tmp_path / rank["RANK"],
            **rank,
            LATENTACT_CACHE=third,
        )
        for rank in ranks(2)
    ]
    for share in shares:
        share.join()
        assert share.exitcode == 0
    assert contents(tmp_path / "out") == expected
    assert "need --engine ray, got local" in cli(*command, "--ray-actors", "2").stderr


def test_torchrun_without_a_launcher_is_one_sentence(label):
    done = cli(*label, "--engine", "torchrun")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: --engine torchrun must be started by torchrun or srun, got neither."
    )
    done = cli(*label, "--engine", "rayy")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --engine must be local, torchrun or ray, got 'rayy'.")
    done = cli(*label, "--ray-actors", "2")
    assert done.returncode == 2
    assert "need --engine ray, got local" in done.stderr


def test_an_absent_cluster_is_one_sentence(label, tmp_path):
    pytest.importorskip("ray")
    process = start(*label, "--engine", "ray", "--ray-address", "127.0.0.1:1", log=tmp_path / "log")
    process.join()
    assert process.exitcode == 2
    assert "cluster must run at 127.0.0.1:1, got ConnectionRefusedError" in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two CPUs, started as the engine starts it."""
    pytest.importorskip("ray")
    from latentact.labeling.engines import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # actors would wait for the other tests
        with ray._cluster("", 2) as started:
            yield started


def actors():
    """Return the processes of Ray actors that this test session has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # zombies, too
            if "MapWorker" in "".join(process.cmdline()):
                found.append(process)
    return found


def test_killed_actors_and_drivers_change_no_byte(label, whole, cluster, tmp_path):
    cache, address = tmp_path / "cache", cluster.get_runtime_context().gcs_address
    command = (*label, "--engine", "ray", "--ray-actors", "2")
    environment = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}  # its token
    driver = fork(
        _main,
        *command,
        "--ray-address",
        address,
        LATENTACT_CACHE=str(cache),
        **environment,
    )
    wait(lambda: parts(cache) > 0, driver)
    actor = actors()[0]
    actor.kill()
    at_kill = parts(cache)
    wait(lambda: parts(cache) > at_kill, driver)
    driver.kill()
    driver.join()
    assert 0 < parts(cache) < 20
    wait(lambda: not actors())
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == whole
    assert not [*cache.glob("tokens/*.partial")]


def test_a_full_cluster_is_one_sentence(label, cluster, tmp_path):
    done = cli(*label, "--engine", "ray", "--ray-actors", "3")
    assert done.returncode == 2
    said = r"error: the Ray cluster must have as many free CPUs as actors \(3\), got [012] of 2\."
    assert re.search(said, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()
