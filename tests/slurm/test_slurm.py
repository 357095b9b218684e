"""`cluster=slurm` on a real SLURM of two nodes: submission, a preempted training that resumes, failures.

The cluster runs on this machine for as long as the tests do, and listens on 127.0.0.1 only.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import TINY_LAM, cli

CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SchedulerParameters=sched_interval=2,batch_sched_delay=0,requeue_delay=0
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
JOB = (
    *("cluster=slurm", "cluster.compute.num_nodes=2", "cluster.compute.cpus_per_task=1"),
    *("cluster.compute.time='10'", "cluster.setup=['export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1']"),
)
"""Two tasks on two nodes, whose names do not resolve."""
TRAINING = (*TINY_LAM, "training.steps=96", "training.log_every=1", "training.strategy=fsdp")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm")]
ON_CPU = ("training.device=cpu", "training.precision=32-true")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start the cluster; `sbatch` of this process uses it."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    daemons = [shutil.which(name, path=path) for name in ("slurmctld", "slurmd", "slurmd")]
    if None in daemons or os.getuid() != 0:
        pytest.skip("needs slurmctld and slurmd, and to be root; `make test-slurm` installs them")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=ports))
    log, processes = folder / "slurm-daemons.out", []
    with pytest.MonkeyPatch.context() as patch, log.open("w") as out:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            for daemon, node in zip(daemons, ([], ["-N", "n1"], ["-N", "n2"]), strict=True):
                processes.append(subprocess.Popen([str(daemon), "-D", *node], stdout=out, stderr=out))
            wait_for(lambda: said("sinfo", "--noheader", "--format=%D %T") == "2 idle", folder)
            yield
        finally:
            said("scancel", "--user=root", "--signal=KILL")
            for process in reversed(processes):
                process.terminate()
                process.wait(timeout=30)


def said(*words: str) -> str:
    """Return what a command of SLURM prints; nothing if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout.strip()


def wait_for(event: Callable[[], bool], run: Path, seconds: float = 600) -> None:
    """Wait; on a busy machine a job takes a while to start. Show the logs in `run` if it takes too long."""
    end = time.monotonic() + seconds
    while not event():
        logs = "\n".join(path.read_text(errors="replace") for path in run.glob("slurm-*.out"))
        assert time.monotonic() < end, logs[-5000:]
        time.sleep(0.1)


def submit(*typed: str) -> tuple[str, Path]:
    """Submit a job; return its id and its log."""
    done = cli(*typed, "--json")
    assert done.returncode == 0, done.stderr
    submitted = json.loads(done.stdout)
    return submitted["job"], Path(submitted["log"])


def state(job: str) -> str:
    found = re.search(r"JobState=(\w+)", said("scontrol", "show", "job", job))
    return found[1] if found else ""


def losses(run: Path) -> list[float]:
    if not (run / "metrics.csv").exists():
        return []
    rows = csv.DictReader((run / "metrics.csv").open())
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


def test_a_preempted_training_is_requeued_and_ends_with_the_same_losses(blocks, tmp_path):
    typed = ("train-lam", f"data.path={blocks}", *TRAINING, *ON_CPU, *JOB)
    run, other = tmp_path / "preempted", tmp_path / "undisturbed"
    job, log = submit(*typed, f"out={run}")
    again = cli(*typed, f"out={run}")
    assert again.returncode == 2
    assert f"must have no job in the queue, got job {job} (" in again.stderr
    wait_for(lambda: len(losses(run)) > 3, run)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait_for(lambda: state(job) in ("COMPLETED", "FAILED"), run)
    text = log.read_text()
    assert state(job) == "COMPLETED", text
    assert "Restarts=1" in said("scontrol", "show", "job", job)
    assert "Traceback" not in text
    stopped = re.search(r"stopped at step (\d+) of .*resuming from step (\d+)", text, re.DOTALL)
    assert stopped, text
    assert stopped[1] == stopped[2]
    job, log = submit(*typed, f"out={other}")
    wait_for(lambda: state(job) in ("COMPLETED", "FAILED"), other)
    assert losses(run) == losses(other), log.read_text()
    assert len(losses(run)) == 96
    assert (run / "lam.json").exists()


def test_a_job_that_fails_says_where_its_log_is(tmp_path):
    typed = ("train-lam", f"data.path={tmp_path}/missing", f"out={tmp_path}/run", "cluster=slurm")
    typed = (*typed, "cluster.compute.cpus_per_task=1", *ON_CPU)
    job, log = submit(*typed)
    wait_for(lambda: state(job) == "FAILED", log.parent)
    assert "error: " in log.read_text()
    assert f"job {job} failed with exit code 2; its log is {log}" in log.read_text()
    again = cli(*typed)
    assert f"job {job} ended with exit code 2; its log is {log}" in again.stderr
    newer = re.fullmatch(r"submitted job (\d+); its log: .*\n", again.stdout)
    assert newer, again.stdout
    said("scancel", newer[1])


def test_a_refused_job_leaves_nothing(blocks, tmp_path):
    typed = ("train-lam", f"data.path={blocks}", f"out={tmp_path}/run", *JOB, *ON_CPU)
    done = cli(*typed, "cluster.compute.partition=gpus")
    assert done.returncode == 2
    assert done.stderr.startswith("error: SLURM rejected the job: ")
    assert "gpus" in done.stderr
    assert not (tmp_path / "run").exists()
