"""Features of every frame under a frozen vision backbone of timm or transformers, computed once and cached.

They are cached next to the decoded frames, under a key of frames, backbone and weights. A killed run
resumes with the next batch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from latentact.data.cache import writable
from latentact.data.digest import blake2b
from latentact.data.store import FrameStore
from latentact.errors import UserError, missing_extra
from latentact.io.atomic import atomic_dir, disk_full
from latentact.io.tensors import save_tensors
from latentact.lams.targets import TargetConfig
from latentact.progress import Progress

log = logging.getLogger(__name__)

_VERSION = 1
_BATCH = 64
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def with_features(
    lam: Any, store: FrameStore, device: str = "cpu"
) -> tuple[Any, Float16[np.ndarray, "n f"] | None]:
    """Return a LAM's settings with the size of its target, and the features of every row of the store.

    Settings with a different target are returned unchanged, with None.

    Raises:
        UserError: the backbone or its package is missing, or the disk is full.
    """
    target: TargetConfig | None = lam.target
    if target is None or target.kind != "frozen_features":
        return lam, None
    features = frozen_features(store, target, device)
    return replace(lam, target=replace(target, size=features.shape[1])), features


def frozen_features(
    store: FrameStore, target: TargetConfig, device: str = "cpu"
) -> Float16[np.ndarray, "n f"]:
    """Return the features of every row of the store, memory-mapped, from the cache if possible."""
    if store.frames.shape[-1] != 3:
        raise UserError(
            f"{store.path} must hold color images for frozen_features, got {store.frames.shape[-1]} "
            f"channels. Use pixels."
        )
    backbone, weights = load_backbone(target.backbone, device)
    key = blake2b(json.dumps([_VERSION, store.digest, weights, target.grid]).encode())
    folder = store.folder.parent / "features"
    entry, partial = folder / key, folder / f"{key}.partial"
    try:
        with FileLock(writable(folder / f"{key}.lock")):
            if not entry.is_dir():
                size = _compute(store, target.grid, backbone, partial)
                with atomic_dir(entry) as made:
                    partial.rename(made / "features")
                    (made / "size").write_text(str(size))
    except OSError as error:
        if not disk_full(error):
            raise
        raise UserError(
            f"the disk of {folder} is full. Free space there, choose a smaller lam.target.grid, or set "
            f"data.cache_dir to a folder on another disk."
        ) from error
    size = int((entry / "size").read_text())
    return np.memmap(entry / "features", np.float16, "r", shape=(len(store.frames), size))


def _compute(store: FrameStore, grid: int, backbone: Callable[[Tensor], Tensor], partial: Path) -> int:
    """Write the features of all rows in batches, after those already written."""

    def rows(start: int) -> Float16[np.ndarray, "m f"]:
        frames = torch.from_numpy(np.array(store.frames[start : start + _BATCH])).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(backbone(frames).float(), grid).flatten(1).cpu().half().numpy()

    total = len(store.frames)
    size = rows(0).shape[1]
    partial.touch()
    with partial.open("r+b") as file:
        done = file.seek(0, 2) // (2 * size * _BATCH) * _BATCH
        file.seek(done * 2 * size)
        file.truncate()
        with Progress("computing features", total, "frames", done=done) as progress:
            for start in range(done, total, _BATCH):
                found = rows(start)
                file.write(found.tobytes())
                file.flush()
                progress.advance(len(found))
    return size


def load_backbone(name: str, device: str) -> tuple[Callable[[UInt8[Tensor, "b 3 h w"]], Tensor], str]:
    """Return a function from frames to feature maps ``[b, d, y, x]``, and the hash of its weights.

    Args:
        name: timm/NAME, or the hub id or folder of a vision model of transformers.
        device: cpu, cuda or mps.

    Raises:
        UserError: the backbone cannot be loaded, or its package is not installed.
    """
    try:
        load = _timm if name.startswith("timm/") else _transformers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # parts missing from a checkpoint, such as an unused pooler, are random
            model, maps, size, colors = load(name.removeprefix("timm/"))
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"lam.target.backbone must be timm/NAME, or the hub id or folder of a vision model of "
            f"transformers, got {name!r} ({first})."
        ) from error
    model.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in colors)

    @torch.no_grad()
    def features(frames: Tensor) -> Float[Tensor, "b d y x"]:
        x = frames.to(device).float() / 255
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return maps((x - mean) / std)

    return features, save_tensors(None, model.state_dict())


def _timm(name: str) -> tuple[Any, Callable[[Tensor], Tensor], int, Any]:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise missing_extra("timm", "features") from error
    model: Any = timm.create_model(name, pretrained=True, features_only=True, out_indices=[-1])
    data_config = resolve_model_data_config(model)
    return (
        model,
        lambda x: model(x)[-1],
        data_config["input_size"][-1],
        (data_config["mean"], data_config["std"]),
    )


def _transformers(name: str) -> tuple[Any, Callable[[Tensor], Tensor], int, Any]:
    try:
        from transformers import AutoModel
        from transformers.image_processing_utils import BaseImageProcessor
        from transformers.utils import logging as chatter
    except ImportError as error:
        raise missing_extra("transformers", "features") from error
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    loaded: Any = AutoModel.from_pretrained(name, trust_remote_code=False)
    model = getattr(loaded, "vision_model", loaded)
    size = getattr(model.config, "image_size", None) or 224
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(name)
    except OSError:  # without a preprocessor: the statistics of ImageNet
        processor = {}
    colors = processor.get("image_mean", IMAGENET[0]), processor.get("image_std", IMAGENET[1])
    return model, lambda x: _as_map(model(pixel_values=x).last_hidden_state), size, colors


def _as_map(out: Tensor) -> Float[Tensor, "b d y x"]:
    """Return the last tokens as a square map, without class and register tokens."""
    if out.ndim == 4:
        return out
    side = math.isqrt(out.shape[1])
    return out[:, -side * side :].mT.unflatten(2, (side, side))
