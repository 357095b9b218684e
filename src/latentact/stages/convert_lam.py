"""Write a published latent action model in our format: `latentact convert-lam WHERE --out DIR`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from latentact.errors import UserError
from latentact.lams.contract import load_lam

log = logging.getLogger(__name__)


def run(where: str, out: str, **keywords: Any) -> Path:
    """Load a model of villa-X, LAPO or LAPA and save it; returns its folder.

    Args:
        where: folder, file or hub id.
        out: folder to write; it gives the same numbers.
        keywords: what the published files do not say, as in `load_lam`.

    Raises:
        UserError: the folder holds something already, or the model cannot be read.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{out} exists already; give another --out.")
    model = load_lam(where, **keywords)
    model.save_pretrained(folder)
    spec = model.spec
    log.info("%s: %s, %d tokens of %d numbers per transition", out, spec.model, spec.tokens, spec.token_dim)
    return folder
