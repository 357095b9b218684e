"""`cluster=slurm`: outside a job, write `job.sbatch` and submit it; inside, train.

The script in the run folder can be read, edited and submitted by hand. A job that is preempted or
runs out of time gets USR1 from SLURM, saves a checkpoint, ends with exit code 75 and is requeued; it resumes
exactly (`latentact.preemption`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from latentact.composition import job_settings
from latentact.config import Between, Count, Limit, OneOf, check_bounds
from latentact.errors import UserError, require_one_of
from latentact.io.atomic import atomic_write, write_json
from latentact.io.records import Record, read_record
from latentact.preemption import EXIT_CODE, MARK
from latentact.training.cluster.contract import CLUSTERS, ComputeConfig, trainings
from latentact.training.run_folder import check_settings, log

RUNTIMES = ("none", "apptainer", "enroot")


@dataclass(frozen=True, kw_only=True)
class SlurmComputeConfig(ComputeConfig):
    """Resources of a job."""

    cpus_per_task: Annotated[int, Between(1, 1024)] = 8
    """CPU cores per process."""
    mem_gb: Limit = 0
    """Memory per machine in GB; 0: the partition's default."""
    time: str = "24:00:00"
    """Time limit of a job in SLURM's format; a longer training is requeued and resumes."""
    partition: str = ""
    """Partition; empty: the default one."""
    account: str = ""
    """Account to charge; empty: the default one."""
    qos: str = ""
    """Quality of service; empty: the default one."""
    constraint: str = ""
    """Features that the machines must have; empty: any."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch: ['--mail-type=FAIL']."""


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """A container in which the job runs `latentact`."""

    runtime: Annotated[str, OneOf(RUNTIMES)] = "none"
    """none: this Python environment; apptainer; enroot, through pyxis."""
    image: str = ""
    """Image file (.sif or .sqsh) or URL."""
    binds: tuple[str, ...] = ()
    """Folders to mount in addition to the working folder and the run folder, as SOURCE or SOURCE:TARGET."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("cluster.container.runtime", self.runtime, RUNTIMES)
        if (self.runtime == "none") != (not self.image):
            raise UserError(
                f"cluster.container must have both runtime and image, got {self.runtime!r} and "
                f"{self.image!r}."
            )


class _Job(Record):
    """`job.json`: the newest job of a run folder."""

    job: str
    log: str


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job in SLURM's queue."""

    job: str
    """SLURM's id."""
    script: Path
    """The job script."""
    log: Path
    """Log file of the job."""

    def __str__(self) -> str:
        """Return one line for the terminal."""
        return f"submitted job {self.job}; its log: {self.log}"


@CLUSTERS.register("slurm")
@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """A SLURM cluster."""

    kind: str = "slurm"
    compute: SlurmComputeConfig = field(default_factory=SlurmComputeConfig)
    """Resources of a job."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Container in which it runs."""
    setup: tuple[str, ...] = ()
    """Shell commands before the training: ['module load cuda', 'export HF_HUB_OFFLINE=1']."""
    requeue: bool = True
    """Whether a job that is preempted or out of time is requeued and resumes."""
    signal_s: Count = 120
    """Seconds before the end at which SLURM asks the job to save a checkpoint and stop."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)

    def launch(self, command: str, run: Callable[[Any, Path], Any], config: Any, out: Path) -> Any:
        """Run the stage inside a job; outside, submit one.

        Raises:
            UserError: SLURM is missing or rejects the job, the run folder has other settings, or its job is
                still in the queue.
        """
        if self.compute.num_nodes * self.compute.gpus_per_node > 1 and config.ONE_PROCESS:
            raise UserError(
                f"cluster.compute must be one machine with one GPU for {command}, which trains several small "
                f"models one after another. Leave out num_nodes and gpus_per_node."
            )
        sizes = {(t.num_nodes, t.devices) for t in trainings(config)}
        processes = (self.compute.num_nodes, self.compute.gpus_per_node)
        if sizes - {processes}:
            raise UserError(
                f"training.num_nodes and training.devices must be those of cluster.compute {processes}, got "
                f"{max(sizes - {processes})}. Set only cluster.compute.num_nodes and gpus_per_node."
            )
        if "SLURM_JOB_ID" in os.environ:
            return run(config, out)
        return _submit(self, command, config, out)


def _submit(cluster: SlurmConfig, command: str, config: Any, out: Path) -> Submitted:
    """Write the job script and submit it."""
    if not shutil.which("sbatch"):
        raise UserError(
            "cluster=slurm needs the command sbatch, which is not on the PATH. Run this where jobs are "
            "submitted from, or give cluster=local to train on this machine."
        )
    check_settings(out, config)
    _check_previous(out)
    cpu = all(training.device == "cpu" for training in trainings(config))
    words = [word for word in job_settings() if not word.startswith("out=")]
    existed, script = out.exists(), out / "job.sbatch"
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(script) as partial:
        partial.write_text(job_script(cluster, [command, *words, f"out={out}"], out, cpu=cpu))
    answer = subprocess.run(
        ["sbatch", "--parsable", script],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if answer.returncode:
        if not existed:
            shutil.rmtree(out)
        message = " ".join(answer.stderr.split()).removeprefix("sbatch: ").removeprefix("error: ").rstrip(".")
        without = ", or give training.device=cpu" if "gres" in message else ""
        raise UserError(
            f"SLURM rejected the job: {message}. Change the settings of cluster.compute{without}."
        )
    job = answer.stdout.strip().partition(";")[0]
    submitted = Submitted(job=job, script=script, log=out / f"slurm-{job}.out")
    (out / "job.status").unlink(missing_ok=True)
    write_json(out / "job.json", {"job": job, "log": str(submitted.log)})
    return submitted


def _check_previous(out: Path) -> None:
    """Log how the newest job of a run folder ended; raise a UserError if it is still in the queue."""
    if not (out / "job.json").exists():
        return
    last = read_record(_Job, out / "job.json")
    queue = ["squeue", "--noheader", "--format=%T", "--job", last.job]
    states = subprocess.run(queue, capture_output=True, text=True, check=False).stdout.split()
    if states:
        raise UserError(
            f"{out} must have no job in the queue, got job {last.job} ({states[0].lower()}). Wait for it, or "
            f"stop it with scancel {last.job}; its log is {last.log}."
        )
    status = out / "job.status"
    ended = status.read_text().strip() if status.exists() else "no exit code"
    if ended != "0":
        log.warning("job %s ended with %s; its log is %s", last.job, ended, last.log)


def job_script(cluster: SlurmConfig, words: list[str], out: Path, *, cpu: bool) -> str:
    """Return the job script.

    Args:
        cluster: settings.
        words: command and settings, without `latentact`.
        out: run folder.
        cpu: whether to train without GPUs.
    """
    run = shlex.join(["srun", "--kill-on-bad-exit=1"]) + ' --cpus-per-task="$SLURM_CPUS_PER_TASK"'
    run += f" \\\n  {shlex.join([*_in_container(cluster.container, out, cpu=cpu), *words])}"
    requeue = (
        f"""
  {EXIT_CODE}|138)  # stopped by SLURM's signal, at a checkpoint; 138: before the first line of the program
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 ;;"""
        * cluster.requeue
    )
    options = "\n".join(f"#SBATCH {option}" for option in _options(cluster, words[0], out, cpu=cpu))
    return f"""#!/bin/bash
# Written by latentact {words[0]}; submit it again with: sbatch {shlex.quote(str(out / "job.sbatch"))}
{options}
{"".join(f"{line}\n" for line in cluster.setup)}
log={shlex.quote(str(out))}/slurm-$SLURM_JOB_ID.out
export {MARK}={shlex.quote(str(out / "job.preempted"))}
rm -f "${MARK}"
{run}
status=$?
if [ -e "${MARK}" ]; then status={EXIT_CODE}; fi
echo "exit code $status" > {shlex.quote(str(out / "job.status"))}
case $status in
  0) ;;{requeue}
  *)
    echo "job $SLURM_JOB_ID failed with exit code $status; its log is $log" ;;
esac
exit $status
"""


def _options(cluster: SlurmConfig, name: str, out: Path, *, cpu: bool) -> Iterator[str]:
    """Yield the options of sbatch."""
    compute = cluster.compute
    yield f"--job-name=latentact-{name}"
    yield f"--chdir={_quoted(Path.cwd())}"
    yield f"--output={_quoted(out).replace('%', '%%')}/slurm-%j.out"
    yield "--open-mode=append"
    yield f"--nodes={compute.num_nodes}"
    yield f"--ntasks-per-node={compute.gpus_per_node}"
    if not cpu:
        yield f"--gpus-per-node={compute.gpus_per_node}"
    yield f"--cpus-per-task={compute.cpus_per_task}"
    if compute.mem_gb:
        yield f"--mem={compute.mem_gb}G"
    yield f"--time={compute.time}"
    for option in ("partition", "account", "qos", "constraint"):
        if value := getattr(compute, option):
            yield f"--{option}={value}"
    yield "--requeue" if cluster.requeue else "--no-requeue"
    yield f"--signal=USR1@{cluster.signal_s}"
    yield from compute.extra


def _quoted(path: Path) -> str:
    """Return a path for an option of sbatch, which splits at spaces."""
    return str(path).replace("\\", "\\\\").replace(" ", "\\ ")


def _in_container(container: ContainerConfig, out: Path, *, cpu: bool) -> list[str]:
    """Return the command words that start `latentact`; enroot uses options of srun."""
    binds = [f"{folder}:{folder}" for folder in dict.fromkeys((str(Path.cwd()), str(out)))]
    binds += [bind if ":" in bind else f"{bind}:{bind}" for bind in container.binds]
    match container.runtime:
        case "apptainer":
            start = ["apptainer", "exec", *(() if cpu else ("--nv",)), "--env", "PYTHONNOUSERSITE=1"]
            return [*start, "--bind", ",".join(binds), "--pwd", str(Path.cwd()), container.image, "latentact"]
        case "enroot":
            start = [f"--container-image={container.image}", f"--container-mounts={','.join(binds)}"]
            return [*start, f"--container-workdir={Path.cwd()}", "latentact"]
        case _:
            return [sys.executable, "-m", "latentact"]
