"""Write latent actions for a dataset: `latentact label --lam DIR --data DIR --out DIR`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from latentact.config import BatchSize, Between, OneOf, Seconds, to_dict, updated
from latentact.data.cache import DataConfig
from latentact.data.latents import MANIFEST, Labels, Manifest, write_labels
from latentact.data.stream import FrameStream
from latentact.data.time_base import lam_frame_gap, require_gap
from latentact.device import require_device
from latentact.errors import UserError
from latentact.io.records import read_record
from latentact.labeling.dataset import EncodeOptions, encode_dataset
from latentact.labeling.engines.ray import EngineConfig
from latentact.labeling.precision import PRECISIONS
from latentact.labeling.units import ProcessRank
from latentact.lams.contract import load_lam

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelConfig(EngineConfig):
    """Write the latent action of every frame of a dataset that has another frame one frame gap later."""

    lam: str
    """Folder or hub id of the latent action model."""
    data: DataConfig
    """Data to label; frames are resized as in the LAM's training, not by `data.resize`."""
    out: str
    """Folder for the labels."""
    resolution: Annotated[int, Between(-1, 4096)] = -1
    """Height and width of frames in pixels, in place of `data.resolution`; -1: the LAM's; 0: the data's."""
    frame_gap_s: Seconds = 0.0
    """Seconds between the two frames of a transition; 0: the LAM's own."""
    batch_size: BatchSize = 256
    """Transitions encoded together."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    precision: Annotated[str, OneOf(PRECISIONS)] = "fp32"
    """fp32, bf16 (faster, less exact), int8 (fastest, coarsest), or auto: the fastest that the device
    supports natively and that preserves 99 % of the codes."""


def run(config: LabelConfig) -> Path:
    """Label a dataset and return the folder of the labels."""
    out = Path(config.out)
    process = ProcessRank.from_environment(launched=config.engine == "torchrun")
    options = EncodeOptions(
        batch_size=config.batch_size,
        device=process.device(config.device),
        precision=config.precision,
        cache_dir=config.data.cache_dir,
        process=process,
    )
    require_gap(config.frame_gap_s)
    device = config.loads_on(options.device, config.precision)
    require_device(device)
    model = load_lam(config.lam, device)
    size = model.spec.resolution if config.resolution == -1 else config.resolution
    data = replace(config.data, resolution=size, resize=model.spec.resize)
    requested = {
        "lam": config.lam,
        "weights": model.spec.weights,
        "model": to_dict(model.config),
        "data": to_dict(data),
        "frame_gap_s": config.frame_gap_s,
        "precision": config.precision,
    }
    if (out / MANIFEST).is_file():
        manifest = read_record(Manifest, out / MANIFEST)
        asked = manifest.asked
        kinds = {"model": type(model.config), "data": DataConfig}  # newer settings get their defaults
        asked |= {"lam": config.lam}  # weights and settings identify it; its folder may have moved
        if asked | {name: updated(kind, asked.get(name)) for name, kind in kinds.items()} != requested:
            raise UserError(
                f"{out} must be new or hold these labels, got labels with other settings. Choose another "
                "--out, or delete the folder."
            )
        if manifest.digest != FrameStream(data).key:
            raise UserError(
                f"{data.path} has changed since {out} was written. Choose another --out, or delete the "
                "folder."
            )
        log.info("%s is already finished", out)
        return out
    if out.exists():
        raise UserError(f"{out} must be new or hold labels, got other files. Choose another --out.")
    stream = FrameStream(data)
    gap = lam_frame_gap(model.spec, stream.fps, stream.path, config.frame_gap_s)
    encoded = encode_dataset(model, stream, gap, options, config.build(process, config.lam, data))
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
    provenance = {"precision": encoded.precision, "software": {"latentact": version("latentact")}}
    write_labels(out, labels, encoded.key, {"asked": requested, **provenance})
    frames, episodes = len(encoded.valid), len(encoded.lengths)
    log.info("labeled %d of %d frames of %d episodes", encoded.valid.sum(), frames, episodes)
    return out
