"""Lightning's training checkpoints as folders of safetensors and JSON: written atomically, never a pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from latentact.errors import UserError
from latentact.io.atomic import atomic_dir
from latentact.io.records import parse_json, read_text
from latentact.io.tensors import load_tensors, save_tensors, weights_hash


class FolderCheckpointIO(CheckpointIO):
    """Save the tensors of a checkpoint as `state.safetensors` and its structure as `state.json`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint atomically."""
        tensors: dict[str, torch.Tensor] = {}
        structure = pack(checkpoint, tensors, "")
        with atomic_dir(Path(path)) as folder:
            weights = save_tensors(folder / "state.safetensors", tensors)
            values = {"digest": _digest(structure, weights), "state": structure}
            (folder / "state.json").write_text(json.dumps(values))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU.

        Raises:
            UserError: the checkpoint is damaged or not a training checkpoint.
        """
        folder = Path(path)
        tensors = load_tensors(folder / "state.safetensors")
        values = parse_json(read_text(folder / "state.json"), str(folder / "state.json"))
        weights = weights_hash(folder / "state.safetensors")
        if not isinstance(values, dict) or values.get("digest") != _digest(values.get("state"), weights):
            raise UserError(
                f"{folder} must be a complete training checkpoint, got a damaged one; delete it and re-run "
                f"the command."
            )
        return unpack(values["state"], tensors)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        shutil.rmtree(path, ignore_errors=True)


def _digest(structure: Any, weights: str) -> str:
    """Return the hash of a checkpoint, which detects damage that Lightning does not."""
    return hashlib.blake2b(json.dumps([structure, weights]).encode(), digest_size=16).hexdigest()


def pack(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Return `value` as JSON; its tensors are added to `tensors` under their path."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, pack(v, tensors, f"{name}/{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(v, tensors, f"{name}/{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"training state {name} must be tensors, numbers or strings, got {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value from the output of `pack`."""
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: unpack(v, tensors) for k, v in content}
    items = [unpack(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
