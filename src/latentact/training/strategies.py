"""Distribution of training over processes: `training.strategy=auto|ddp|fsdp`.

`ddp` keeps the whole model on every device. `fsdp` (PyTorch's FSDP2) shards weights, gradients and optimizer
state; a module lists the classes to shard individually in `_no_split_modules`, as in transformers, and the
rest forms one more shard group. Each process writes its shard of a checkpoint as safetensors; any number of
processes can load it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard

from latentact.errors import UserError
from latentact.io.records import parse_json, read_text
from latentact.io.tensors import load_tensors
from latentact.training.checkpoint_io import pack, unpack
from latentact.training.settings import TrainingConfig

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def build_strategy(config: TrainingConfig) -> Strategy | str:
    """Return Lightning's strategy; one process with strategy=auto needs none."""
    processes = config.devices * config.num_nodes
    if config.strategy == "auto" and processes == 1:
        return "auto"
    cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    backend = "nccl" if cuda else "gloo"
    if config.strategy == "fsdp":
        return ShardedStrategy(
            data_parallel_size=processes, tensor_parallel_size=1, process_group_backend=backend
        )
    return ReplicatedStrategy(process_group_backend=backend)


def build_environment(config: TrainingConfig) -> list[SLURMEnvironment]:
    """Return the cluster environment of a SLURM job; Lightning detects other launchers.

    Raises:
        UserError: the job has the wrong number of tasks.
    """
    warnings.filterwarnings("ignore", message=r".*`srun` command is available")  # also outside of any job
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    tasks, processes = int(os.environ["SLURM_NTASKS"]), config.num_nodes * config.devices
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"a SLURM job must set --ntasks-per-node, got --ntasks={tasks} only. Submit it with both."
        )
    if processes not in (1, tasks):
        raise UserError(
            f"cluster.compute.num_nodes x gpus_per_node must be the {tasks} tasks of this SLURM job, got "
            f"{config.num_nodes} x {config.devices}. Start the command with srun and these numbers."
        )
    return [SLURMEnvironment(auto_requeue=False)]  # `latentact.preemption` requeues


class _Launcher(_SubprocessScriptLauncher):
    """Start the other processes of this node with the command line of this one."""

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        environment = self.cluster_environment
        os.environ |= {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "LOCAL_RANK": str(environment.local_rank()),
            "WORLD_SIZE": str(self.num_processes * self.num_nodes),
        }
        command = [sys.executable, *sys.orig_argv[1:]]
        self.procs = [
            subprocess.Popen(command, env=os.environ | {"LOCAL_RANK": str(rank)})
            for rank in range(1, self.num_processes)
        ]


class ReplicatedStrategy(DDPStrategy):
    """The whole model on every device."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class ShardedStrategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state in shards, checkpoints too."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` writes the weights."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` writes the optimizer state."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the shards of every process and the loop's state; the folder appears atomically."""
        path = Path(self.broadcast(str(filepath)))
        partial = path.parent / f".{path.name}.partial"
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.barrier()
        tensors, numbers = self._state()
        writer = HuggingFaceStorageWriter(path=str(partial), save_distributed=True)
        save(tensors, storage_writer=writer)
        if self.is_global_zero:
            state = {"processes": self.world_size, "numbers": numbers, "loop": pack(checkpoint, {}, "")}
            (partial / "state.json").write_text(json.dumps(state))
            partial.rename(path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the weights and optimizer state of this process and return the loop's state.

        The checkpoint may be from a different number of processes.

        Raises:
            UserError: a shard is missing or damaged.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        values = parse_json(read_text(path / "state.json"), str(path / "state.json"))
        shards = sorted(path.glob("*.safetensors"))
        if len(shards) != values.get("processes", len(shards) or 1):
            raise UserError(
                f"{path} must hold one safetensors file of each process that wrote it, got {len(shards)} of "
                f"{values.get('processes', 1)}. Copy the folder again, or delete it to start over."
            )
        for shard in shards:
            load_tensors(shard, names=())
        tensors, _ = self._state()
        load(tensors, storage_reader=HuggingFaceStorageReader(path=str(path)))
        assert self.model is not None
        model: dict[str, Any] = {
            k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")
        }
        optim = {k.removeprefix("optim/"): v for k, v in tensors.items() if k.startswith("optim/")}
        set_model_state_dict(self.model, model)
        set_optimizer_state_dict(self.model, self.optimizers, optim | values["numbers"], options=_FLAT)
        return unpack(values["loop"], {})

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the shards of weights and optimizer state by name, and the optimizer's plain numbers."""
        assert self.model is not None
        optim: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizers, options=_FLAT)
        tensors: dict[str, Any] = {f"model/{k}": v for k, v in get_model_state_dict(self.model).items()}
        tensors |= {f"optim/{k}": v for k, v in optim.items() if isinstance(v, Tensor)}
        return tensors, {k: v for k, v in optim.items() if not isinstance(v, Tensor)}


class ShardedLoss(nn.Module):
    """A sharded copy of a model, whose forward pass is the loss.

    The model itself stays a plain module, which evaluation and checkpoints use; `gather` updates it.

    Args:
        model: model with `loss(batch)`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trained = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def shard(self, mesh: Any) -> None:
        """Shard the copy over a device mesh."""
        names = getattr(self.trained, "_no_split_modules", ())
        for module in self.trained.modules():
            if type(module).__name__ in names:
                fully_shard(module, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch."""
        loss: Any = self.trained.loss
        return loss(batch)

    def gather(self, model: nn.Module) -> None:
        """Copy the weights of all shards into `model`, in the first process; call it in all of them."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        if weights := get_model_state_dict(self.trained, options=options):
            model.load_state_dict(weights)
