"""Write latent actions for a dataset: `latentact label --lam DIR --data DIR --out DIR`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from latentact.config import to_dict
from latentact.data.cache import DataConfig
from latentact.data.latents import MANIFEST, Labels, Manifest, write_labels
from latentact.data.stream import FrameStream
from latentact.device import require_device
from latentact.errors import UserError
from latentact.io.records import read_record
from latentact.labeling.dataset import EncodeOptions, encode_dataset, gap_in_frames, require_gap
from latentact.lams.contract import load_lam

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Write latent actions for every frame of a dataset that has a successor at the LAM's frame gap."""

    lam: str
    """Folder or hub id of the latent action model."""
    data: DataConfig
    """What to label; frames are resized as in the LAM's training, whatever `data.resize` says."""
    out: str
    """Folder for the labels."""
    lam_resolution: bool = False
    """Whether frames get the LAM's own resolution, whatever `data.resolution` says."""
    frame_gap_s: float = 0.0
    """Seconds between the two frames of a transition; 0: the LAM's own."""
    batch_size: int = 256
    """Transitions encoded together."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    precision: str = "fp32"
    """fp32, bf16 (faster, other last digits), int8 (faster still, coarser), or auto: the fastest that this
    machine multiplies and that keeps 99 % of the codes."""


def run(config: LabelConfig) -> Path:
    """Label a dataset; returns the folder of the labels."""
    out = Path(config.out)
    options = EncodeOptions(
        batch_size=config.batch_size,
        device=config.device,
        precision=config.precision,
        cache_dir=config.data.cache_dir,
    )
    require_gap(config.frame_gap_s)
    require_device(config.device)
    model = load_lam(config.lam, config.device)
    size = model.spec.resolution if config.lam_resolution else config.data.resolution
    data = replace(config.data, resolution=size, resize=model.spec.resize)
    asked = {
        "lam": config.lam,
        "weights": model.spec.weights,
        "model": to_dict(model.config),
        "data": to_dict(data),
        "frame_gap_s": config.frame_gap_s,
        "precision": config.precision,
    }
    if (out / MANIFEST).is_file():
        if read_record(Manifest, out / MANIFEST).asked != asked:
            raise UserError(f"{out} holds other labels; give another --out, or delete the folder.")
        log.info("%s is already finished", out)
        return out
    if out.exists():
        raise UserError(f"{out} exists and holds no labels; give another --out.")
    stream = FrameStream(data)
    gap = gap_in_frames(model.spec, stream.fps, stream.path, config.frame_gap_s)
    encoded = encode_dataset(model, stream, gap, options)
    if encoded is None:  # the first of several processes writes
        return out
    labels = Labels(
        spec=encoded.spec,
        data=data,
        vectors=encoded.vectors,
        continuous=encoded.continuous,
        codes=encoded.codes,
        valid=encoded.valid,
    )
    made = {"precision": encoded.precision, "software": {"latentact": version("latentact")}}
    write_labels(out, labels, encoded.key, {"asked": asked, **made})
    frames, episodes = len(encoded.valid), len(encoded.lengths)
    log.info("labeled %d of %d frames of %d episodes", encoded.valid.sum(), frames, episodes)
    return out
