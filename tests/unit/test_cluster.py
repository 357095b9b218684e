"""Clusters, preemption, groups of settings and launchers without a scheduler."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from conftest import TINY_LAM, cli
from latentact import preemption
from latentact.cli.commands import app  # noqa: F401 (registers the commands)
from latentact.cli.stage_command import HYDRA_COMMANDS
from latentact.composition import load_experiment
from latentact.errors import UserError
from latentact.stages.train_lam import TrainLamConfig
from latentact.training.cluster.contract import CLUSTERS, ClusterStage
from latentact.training.cluster.slurm import ContainerConfig, SlurmComputeConfig, SlurmConfig, job_script
from latentact.training.metrics_csv import MetricsCsv


def settings(*typed: str) -> TrainLamConfig:
    return load_experiment("train_lam", TrainLamConfig, ["data.path=DIR", *typed])


# --- settings


def test_other_spellings_name_the_same_settings():
    config = settings(
        *("experiment=laq_full", "data.batch_size=512", "training.optimizer.lr=5e-5"),
        "cluster.compute.num_nodes=2",
    )
    assert (config.training.batch_size, config.training.lr) == (512, 5e-5)
    assert (config.training.num_nodes, config.training.devices) == (2, 1)
    assert (config.cluster.kind, config.cluster.compute.num_nodes) == ("slurm", 2)
    same = settings("experiment=laq_full", "training.batch_size=512", "training.lr=5e-5")
    assert replace(same.training, num_nodes=2) == config.training


def test_the_full_laq_has_the_published_settings():
    config, plain = settings("experiment=laq_full"), settings("experiment=laq")
    training = config.training
    assert (training.steps, training.batch_size, training.lr, training.grad_clip) == (100_005, 64, 1e-4, 0.5)
    assert (training.weight_decay, training.warmup_steps, training.final_lr_factor) == (0, 0, 1)
    assert training.betas == plain.training.betas == (0.9, 0.99)
    assert (config.data.resolution, config.frame_gap_s) == (256, 0.6)
    assert config.lam == plain.lam


def test_the_size_of_a_cluster_is_the_size_of_the_training():
    training = settings("cluster=lrz_h100", "cluster.compute.num_nodes=8").training
    assert (training.num_nodes, training.devices) == (8, 4)
    assert settings("training.devices=2").training.devices == 2


def test_a_users_folder_has_experiments_data_and_clusters_of_its_own(tmp_path):
    files = {
        "experiment/mine.yaml": "# @package _global_\n"
        "defaults: [override /lam: laq, override /data: kitchen, override /cluster: mine]\n"
        "training: {batch_size: 32}\ncluster: {compute: {num_nodes: 4}}\n",
        "data/kitchen.yaml": "defaults: [openx_webdataset, _self_]\ndata: {target_fps: 5}\n",
        "cluster/mine.yaml": "defaults: [slurm, _self_]\ncompute: {gpus_per_node: 8, partition: gpu}\n",
    }
    files["data/kitchen.yaml"] = "# @package _global_\n" + files["data/kitchen.yaml"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = cli("train-lam", "--config-dir", tmp_path, "experiment=mine", "data.path=DIR", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert (shown["lam"]["kind"], shown["training"]["batch_size"]) == ("laq", 32)
    assert (shown["data"]["resolution"], shown["data"]["target_fps"], shown["frame_gap_s"]) == (256, 5, 0.6)
    compute = shown["cluster"]["compute"]
    assert (compute["num_nodes"], compute["gpus_per_node"], compute["partition"]) == (4, 8, "gpu")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["data=opnx_webdataset"], "unknown data 'opnx_webdataset'; did you mean 'openx_webdataset'"),
        (["cluster=slrm"], "unknown cluster 'slrm'; did you mean 'slurm'"),
        (["cluster=slurm", "cluster.compute.partitoin=x"], "did you mean 'cluster.compute.partition'"),
        (["cluster=slurm", "cluster.compute.num_nodes=0"], "num_nodes must be between 1 and 4096, got 0"),
        (
            ["cluster=slurm", "cluster.container.runtime=podman"],
            r"cluster.container.runtime must be .* got 'podman'",
        ),
        (["cluster=slurm", "cluster.container.runtime=apptainer"], "must have both runtime and image"),
        (["lam=3"], "unknown lam '3'"),
    ],
)
def test_wrong_clusters_are_one_sentence(typed, message):
    with pytest.raises(UserError, match=message):
        settings(*typed)


@pytest.mark.parametrize(
    ("command", "typed", "message"),
    [
        (
            "train-lam",
            ["cluster.compute.num_nodes=2"],
            "must be 1 with cluster=local, got 2. Give cluster=slurm",
        ),
        ("train-lam", ["cluster=slurm", "training.devices=2"], r"must be those of cluster.compute \(1, 1\)"),
        ("train-lam", ["cluster=slurm"], "needs the command sbatch, which is not on the PATH"),
        (
            "compare",
            ["cluster=slurm", "cluster.compute.num_nodes=2", "env=babyai/GoToRedBall"],
            "one machine with one GPU for compare",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused(command, typed, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    done = cli(command, "data.path=DIR", *typed, f"out={tmp_path}/run")
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_every_stage_with_overrides_can_run_on_a_cluster():
    stages = {name: command.config_class for name, command in HYDRA_COMMANDS.items()}
    assert all(issubclass(stage, ClusterStage) for stage in stages.values())
    assert {name for name, stage in stages.items() if stage.ONE_PROCESS} == {
        *("compare", "dagger", "gail", "ground", "learn")
    }


def test_inside_a_job_the_stage_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = settings("cluster=slurm")
    assert config.cluster.launch("train-lam", lambda c, out: (c, out), config, tmp_path) == (config, tmp_path)


def test_a_job_of_another_size_is_refused(monkeypatch):
    from latentact.training.settings import TrainingConfig
    from latentact.training.strategies import build_environment

    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "mine", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="must set --ntasks-per-node, got --ntasks=4"):
        build_environment(TrainingConfig(num_nodes=2, devices=2))
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    [environment] = build_environment(TrainingConfig(num_nodes=2, devices=2))
    assert not environment.auto_requeue
    with pytest.raises(UserError, match=r"must be the 4 tasks of this SLURM job, got 2 x 1"):
        build_environment(TrainingConfig(num_nodes=2))
    monkeypatch.delenv("SLURM_NTASKS")
    assert build_environment(TrainingConfig()) == []


# --- the job script


def test_the_job_script_asks_for_what_is_set(tmp_path):
    compute = SlurmComputeConfig(
        num_nodes=2, gpus_per_node=4, mem_gb=500, partition="gpu", extra=("--mail-type=FAIL",)
    )
    cluster = SlurmConfig(compute=compute, setup=("module load cuda",), signal_s=300)
    out = tmp_path / "a run"
    script = job_script(cluster, ["train-lam", "lam.channels=[8, 16]", f"out={out}"], out, cpu=False)
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    place = str(out).replace(" ", "\\ ")
    expected = [
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--mem=500G"),
        *("--time=24:00:00", "--partition=gpu", "--requeue", "--signal=USR1@300", "--mail-type=FAIL"),
    ]
    assert options == [
        "--job-name=latentact-train-lam",
        f"--chdir={Path.cwd()}",
        f"--output={place}/slurm-%j.out",
        "--open-mode=append",
        *expected,
    ]
    assert script.index("module load cuda") < script.index("srun")
    command = script.replace("\\\n", " ").split("\nsrun ")[1].partition("\n")[0]
    assert shlex.split(command)[-4:] == ["latentact", "train-lam", "lam.channels=[8, 16]", f"out={out}"]
    assert "75|138)" in script
    no_requeue = job_script(replace(cluster, requeue=False), ["train-lam"], out, cpu=True)
    assert "--no-requeue" in no_requeue
    assert "scontrol" not in no_requeue
    assert "gpus-per-node" not in no_requeue


@pytest.mark.parametrize("runtime", ["apptainer", "enroot"])
def test_the_job_runs_in_a_container(runtime, tmp_path):
    container = ContainerConfig(runtime=runtime, image="latentact.img", binds=("/data", "/a:/b"))
    script = job_script(SlurmConfig(container=container), ["train-lam"], tmp_path, cpu=False)
    command = shlex.split(script.replace("\\\n", " ").split("\nsrun ")[1].partition("\n")[0])
    mounts = f"{Path.cwd()}:{Path.cwd()},{tmp_path}:{tmp_path},/data:/data,/a:/b"
    assert command[-2:] == ["latentact", "train-lam"]
    assert sys.executable not in command
    if runtime == "apptainer":
        assert command[command.index("apptainer") :][:3] == ["apptainer", "exec", "--nv"]
        assert command[command.index("--bind") + 1] == mounts
    else:
        assert "--container-image=latentact.img" in command
        assert f"--container-mounts={mounts}" in command


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("requeue", [True, False])
def test_the_job_script_is_sound_shell(requeue, tmp_path):
    script = job_script(SlurmConfig(requeue=requeue), ["train-lam", "a='b c'"], tmp_path / "it's", cpu=True)
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_sweep_submits_a_job_for_each_value(blocks, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\necho $2 >> {tmp_path}/asked\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    typed = ("train-lam", f"data.path={blocks}", "cluster=slurm", f"out={tmp_path}/sweep", "--multirun")
    done = cli(*typed, "training.seed=0,1", "--json")
    assert done.returncode == 0, done.stderr
    assert [each["job"] for each in json.loads(done.stdout)["runs"]] == ["7", "7"]
    scripts = [Path(line) for line in (tmp_path / "asked").read_text().split()]
    assert len({script.parent for script in scripts}) == 2
    for seed, script in enumerate(scripts):
        text = script.read_text()
        assert f" training.seed={seed} out={script.parent}\n" in text
        assert "multirun" not in text
        job = json.loads((script.parent / "job.json").read_text())
        assert job == {"job": "7", "log": str(script.parent / "slurm-7.out")}


# --- preemption and resuming


def test_a_signal_stops_training_at_a_checkpoint_and_the_run_resumes_exactly(blocks, tmp_path, monkeypatch):
    typed = ("train-lam", f"data.path={blocks}", *TINY_LAM, "training.steps=12", "training.log_every=1")
    assert cli(*typed, f"out={tmp_path}/undisturbed").returncode == 0
    log_metrics = MetricsCsv.log_metrics

    def interrupted(self: MetricsCsv, metrics: Any, step: int) -> None:
        log_metrics(self, metrics, step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCsv, "log_metrics", interrupted)
        stopped = cli(*typed, f"out={tmp_path}/run")
    assert stopped.returncode == 75, stopped.stderr
    assert "re-run the command to resume" in stopped.stderr
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step="))
    assert step in (5, 6)
    assert not (tmp_path / "run/lam.json").exists()
    resumed = cli(*typed, f"out={tmp_path}/run", "cluster=slurm", "cluster.compute.cpus_per_task=2")
    assert resumed.returncode == 2, "no sbatch here, but the settings of the run are the same"
    assert cli(*typed, f"out={tmp_path}/run").returncode == 0
    rows = [(tmp_path / name / "metrics.csv").read_text() for name in ("run", "undisturbed")]
    assert rows[0] == rows[1]


def test_a_signal_outside_training_ends_the_command():
    preemption.watch()
    with pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopped.value.code == 75
    with preemption.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert preemption.requested()
    preemption.watch()
    assert not preemption.requested()


def test_a_run_resumes_on_another_cluster(tmp_path):
    from latentact.training.run_folder import begin_run, finished

    begin_run(tmp_path, settings())
    assert not finished(tmp_path, settings("cluster=lrz_h100", "cluster.compute.num_nodes=2"), "lam.json")
    with pytest.raises(UserError, match=r"training\.seed = 0, not 1"):
        finished(tmp_path, settings("training.seed=1"), "lam.json")


# --- launchers of the user's own


class Elsewhere:
    """A launcher of Hydra that runs each job in another process, as submitit does."""

    def __init__(self, **_: Any) -> None: ...

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Any, initial_job_idx: int) -> list[Any]:
        from hydra.core.utils import run_job
        from omegaconf import open_dict

        done = []
        for number, overrides in enumerate(job_overrides):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            read, write = os.pipe()
            if not os.fork():
                result = run_job(
                    hydra_context=self.context,
                    task_function=self.function,
                    config=config,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
                result.cfg = result.hydra_cfg = None
                os.write(write, pickle.dumps(result))
                os._exit(0)
            os.close(write)
            with os.fdopen(read, "rb") as stream:
                done.append(pickle.load(stream))
        return done


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_launcher_elsewhere_does_not_hide_failures(tmp_path, monkeypatch):
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.plugins.launcher import Launcher

    launcher = type("ElsewhereLauncher", (Elsewhere, Launcher), {"__module__": "hydra_plugins.elsewhere"})
    Plugins.instance().register(launcher)  # before the package is there to be searched
    package = SimpleNamespace(elsewhere=SimpleNamespace(ElsewhereLauncher=launcher))
    monkeypatch.setitem(sys.modules, "hydra_plugins", package)
    monkeypatch.setitem(sys.modules, "hydra_plugins.elsewhere", package.elsewhere)
    node = {"_target_": "hydra_plugins.elsewhere.ElsewhereLauncher"}
    ConfigStore.instance().store(group="hydra/launcher", name="elsewhere", node=node)
    typed = ("train-lam", f"data.path={tmp_path}/missing", f"out={tmp_path}/sweep", "training.seed=0,1")
    done = cli(*typed, "--multirun", "hydra/launcher=elsewhere")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*missing does not exist; .*", done.stderr.splitlines()[-1])


def test_every_cluster_is_a_choice():
    assert {"local", "slurm", "lrz_h100"} <= set(CLUSTERS.names())
