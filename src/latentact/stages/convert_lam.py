"""Write a published latent action model in our format: `latentact convert-lam WHERE --out DIR`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from latentact.config import Between, OneOf, Pixels, check_bounds
from latentact.errors import UserError
from latentact.lams.contract import load_lam

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConvertLamConfig:
    """Write a published latent action model in our format; its outputs stay the same."""

    where: str
    """Folder, file or hub id of a villa-X, LAPO or LAPA model."""
    out: str
    """Folder for the model."""
    window: Annotated[str, OneOf(("sliding", "chunked"))] = ""
    """villa-X: windows of frames; empty: sliding."""
    image_size: Pixels = 0
    """LAPA: height and width of the training frames in pixels; 0: 256."""
    code_seq_len: Annotated[int, Between(0, 1 << 20)] = 0
    """LAPA: codes per transition; 0: 4."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        check_bounds(self)


def run(config: ConvertLamConfig) -> Path:
    """Convert a model of villa-X, LAPO or LAPA; return its folder.

    Raises:
        UserError: the folder is not empty, or the model cannot be read.
    """
    folder = Path(config.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--out must be a new or empty folder, got {config.out}. Choose another --out, or delete it."
        )
    settings = {name: getattr(config, name) for name in ("window", "image_size", "code_seq_len")}
    model = load_lam(config.where, **{name: value for name, value in settings.items() if value})
    model.save_pretrained(folder)
    spec = model.spec
    log.info("%s: %s, %d tokens of %d dims per transition", folder, spec.model, spec.tokens, spec.token_dim)
    return folder
