"""Latent labels of a dataset on disk: `lam_tokens.safetensors` and `manifest.json`, beside the data.

One row per row of the store. `vectors`, `continuous` [n, k, d] float32, `codes` [n, k] int64 where the LAM
has codes, `valid` [n] bool: False where an episode ends before the frame gap.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from latentact.checkpoint import load_tensors, read_json, save_tensors, whole_folder, write_json
from latentact.config import from_dict, to_dict
from latentact.data.cache import DataConfig, FrameStore, open_store
from latentact.errors import UserError
from latentact.types import LatentActionSpec

MANIFEST = "manifest.json"
TOKENS = "lam_tokens.safetensors"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Latent actions of every row of a store."""

    spec: LatentActionSpec
    """What they mean."""
    data: DataConfig
    """The data they belong to."""
    vectors: Float32[np.ndarray, "n k d"]
    """After the quantiser."""
    continuous: Float32[np.ndarray, "n k d"]
    """Before it."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices."""
    valid: Bool[np.ndarray, "n"]
    """Whether the row has a latent action."""


def write_labels(out: Path, labels: Labels, store: FrameStore, provenance: dict[str, Any]) -> None:
    """Write labels, whole or not at all."""
    import torch

    arrays = {"vectors": labels.vectors, "continuous": labels.continuous, "valid": labels.valid}
    if labels.codes is not None:
        arrays["codes"] = labels.codes
    with whole_folder(out) as folder:
        save_tensors(folder / TOKENS, {k: torch.from_numpy(v) for k, v in arrays.items()})
        data = {**to_dict(labels.data), "path": str(Path(labels.data.path).absolute())}
        manifest = {
            "spec": asdict(labels.spec),
            "data": data,
            "digest": store.digest,
            "rows": len(labels.valid),
        }
        write_json(folder / MANIFEST, manifest | provenance)


def read_labels(folder: str | Path) -> tuple[Labels, FrameStore]:
    """Return labels that `write_labels` wrote, and the store they belong to.

    Raises:
        UserError: the folder holds no labels, they are truncated, or the data has changed since.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} holds no latent labels; "
            f"make them with: latentact label --lam LAM --data DATA --out DIR."
        )
    manifest = read_json(folder / MANIFEST)
    arrays = {k: v.numpy() for k, v in load_tensors(folder / TOKENS).items()}
    try:
        spec = {**manifest["spec"], "value_range": tuple(manifest["spec"]["value_range"])}
        labels = Labels(
            spec=LatentActionSpec(**spec),
            data=from_dict(DataConfig, manifest["data"], "data"),
            vectors=arrays["vectors"],
            continuous=arrays["continuous"],
            codes=arrays.get("codes"),
            valid=arrays["valid"],
        )
        digest = manifest["digest"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} does not hold whole labels ({error!r}); label the data again.") from error
    store = open_store(labels.data)
    if store.digest != digest or any(len(store.frames) != len(values) for values in arrays.values()):
        raise UserError(f"{labels.data.path} is not the data that {folder} labels any more; label it again.")
    return labels, store
