"""Write latent actions for a dataset: `latentact label --lam DIR --data DIR --out DIR`.

Rows are encoded in shards of fixed size, each kept on disk until all are there, so that a killed run goes on
and ends with the same bytes.
"""

from __future__ import annotations

import io
import logging
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentact.checkpoint import read_json, require_device, whole_file
from latentact.config import to_dict
from latentact.data.cache import DataConfig, FrameStore, open_store
from latentact.data.clips import Clips
from latentact.data.progress import Progress
from latentact.data.tokens import MANIFEST, Labels, write_labels
from latentact.errors import UserError
from latentact.lams.model import LatentActionModel, load_lam

log = logging.getLogger(__name__)

SHARD = 4096  # rows


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Write latent actions for every frame of a dataset that has a successor at the LAM's frame gap."""

    lam: str
    """Folder or hub id of the latent action model."""
    data: DataConfig
    """What to label."""
    out: str
    """Folder for the labels."""
    batch_size: int = 256
    """Transitions encoded together."""
    device: str = "cpu"
    """cpu, cuda or mps."""

    def __post_init__(self) -> None:
        """Refuse an empty batch."""
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; wanted at least 1.")


def run(config: LabelConfig) -> Path:
    """Label a dataset; returns the folder of the labels."""
    out = Path(config.out)
    require_device(config.device)
    model = load_lam(config.lam, config.device)
    data = config.data
    asked = {"lam": config.lam, "weights": model.spec.weights, "data": to_dict(data)}
    if (out / MANIFEST).is_file():
        if read_json(out / MANIFEST).get("asked") != asked:
            raise UserError(f"{out} holds other labels; give another --out, or delete the folder.")
        log.info("%s is already finished", out)
        return out
    if out.exists():
        raise UserError(f"{out} exists and holds no labels; give another --out.")
    store = open_store(data)
    gap = _gap(model, store)
    clips = Clips(store, episodes=range(store.num_episodes), frame_gap=gap, context=model.context)
    parts = _encode(
        model, clips, config, out, f"{model.spec.weights} {store.digest} {gap} {config.batch_size}"
    )

    n, k, d = len(store.frames), model.spec.tokens, model.spec.token_dim
    vectors, continuous = np.zeros((2, n, k, d), np.float32)
    codes = np.zeros((n, k), np.int64) if model.spec.codebook_size else None
    vectors[clips.rows], continuous[clips.rows] = parts["vectors"], parts["continuous"]
    if codes is not None:
        codes[clips.rows] = parts["codes"]
    valid = np.zeros(n, bool)
    valid[clips.rows] = True
    spec = replace(model.spec, frame_gap=gap, frame_gap_s=gap / store.fps, fps=store.fps)
    labels = Labels(spec=spec, data=data, vectors=vectors, continuous=continuous, codes=codes, valid=valid)
    write_labels(out, labels, store, {"asked": asked, "software": {"latentact": version("latentact")}})
    shutil.rmtree(_partial(out))
    log.info("labelled %d of %d frames of %d episodes", valid.sum(), n, store.num_episodes)
    return out


def default_resolution(lam: str) -> int:
    """Return the resolution that a LAM was trained at."""
    return load_lam(lam).spec.resolution


def _gap(model: LatentActionModel, store: FrameStore) -> int:
    """Return the LAM's frame gap in frames of the data: the same time, where the LAM knows it."""
    seconds = model.spec.frame_gap_s
    gap = round(seconds * store.fps) if seconds else model.spec.frame_gap
    if gap < 1 or (seconds and abs(gap / store.fps - seconds) > 0.25 * seconds):
        raise UserError(
            f"the LAM's frame gap is {seconds:g} s and {store.path} has a frame every {1 / store.fps:g} s; "
            f"label data at a matching rate, for example with --target-fps {model.spec.fps:g}."
        )
    return gap


def _encode(
    model: LatentActionModel, clips: Clips, config: LabelConfig, out: Path, identity: str
) -> dict[str, np.ndarray]:
    """Return the latent actions of all rows of `clips`, shard by shard through `<out>.partial`."""
    folder = _partial(out)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "identity"
    if stamp.exists() and stamp.read_text() != identity:
        shutil.rmtree(folder)
        folder.mkdir()
    stamp.write_text(identity)
    shards = []
    with Progress("labelling", len(clips), "transitions") as progress:
        for start in range(0, len(clips), SHARD):
            path = folder / f"{start:012d}.npz"
            rows = clips.rows[start : start + SHARD]
            if not path.exists():
                buffer = io.BytesIO()
                arrays: dict[str, Any] = {**_encode_shard(model, clips, rows, config)}
                np.savez(buffer, **arrays)
                with whole_file(path) as partial:
                    partial.write_bytes(buffer.getvalue())
            shards.append(np.load(path))
            progress.advance(len(rows))
    return {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}


@torch.inference_mode()
def _encode_shard(
    model: LatentActionModel, clips: Clips, rows: np.ndarray, config: LabelConfig
) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {"vectors": [], "continuous": [], "codes": []}
    for start in range(0, len(rows), config.batch_size):
        clip = clips.clip(rows[start : start + config.batch_size]).to(config.device)
        latent = model.encode(clip.frames, clip.valid, last=True)
        for key, values in parts.items():
            if (value := getattr(latent, key)) is not None:
                values.append(value[:, -1].numpy(force=True))
    return {key: np.concatenate(values) for key, values in parts.items() if values}


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")
