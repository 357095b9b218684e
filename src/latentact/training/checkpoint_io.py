"""Lightning's training checkpoints as folders of safetensors and json: whole or absent, never a pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from latentact.io.atomic import atomic_dir, read_json
from latentact.io.tensors import load_tensors, save_tensors


class FolderCheckpointIO(CheckpointIO):
    """Saves the tensors of a checkpoint as `state.safetensors` and its structure as `state.json`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the folder appears only when all of it is on disk."""
        tensors: dict[str, torch.Tensor] = {}
        structure = _pack(checkpoint, tensors, "")
        with atomic_dir(Path(path)) as folder:
            save_tensors(folder / "state.safetensors", tensors)
            (folder / "state.json").write_text(json.dumps(structure))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU."""
        return _unpack(read_json(Path(path) / "state.json"), load_tensors(Path(path) / "state.safetensors"))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        shutil.rmtree(path, ignore_errors=True)


def _pack(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Return `value` as json; its tensors go into `tensors` under their path."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _pack(v, tensors, f"{name}/{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(v, tensors, f"{name}/{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"training state {name} is a {type(value).__name__}, which no checkpoint can hold")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in content}
    items = [_unpack(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
