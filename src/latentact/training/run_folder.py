"""A run folder: its `config.yaml` says what was asked for, its result file that it is finished."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from latentact.config import current_names, to_dict
from latentact.errors import UserError
from latentact.io.atomic import atomic_write
from latentact.io.records import read_yaml

log = logging.getLogger(__name__)


class Busy(UserError):
    """Another process works in the run folder."""


def finished(out: Path, config: Any, result: str) -> bool:
    """Whether a run folder already holds the `result` of this very config; writes nothing.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    path = out / "config.yaml"
    if path.exists():
        found = read_yaml(path)
        if not isinstance(found, dict):
            raise UserError(f"{path} must hold the settings of a run, got {found!r}; delete the folder.")
        if different := _first_difference(current_names(type(config), found), _requested(config)):
            key, old, new = different
            raise UserError(
                f"{out} holds a run with {key} = {old!r}, not {new!r}; "
                f"give another out=, or delete the folder."
            )
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with out=.")
    if not (out / result).exists():
        return False
    log.info("%s is already finished", out)
    return True


def begin_run(out: Path, config: Any) -> None:
    """Write `config.yaml`, once everything that the config names has turned out to be usable."""
    with atomic_write(out / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(_requested(config), sort_keys=False))


@contextmanager
def run_folder(out: Path, config: Any) -> Iterator[None]:
    """Begin a run, and let its body train and write the results.

    Where the run fails on its input after all, before the first checkpoint (as with a learning rate at which
    it diverges), a folder that it made is removed.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        begin_run(out, config)
        yield
    except Busy:
        raise
    except UserError:
        if made and not saved_steps(out):
            shutil.rmtree(made[-1])
        raise


def saved_steps(out: Path) -> list[Path]:
    """Return the training checkpoints of a run folder."""
    return [path for path in out.glob("checkpoints/step=*") if path.name.removeprefix("step=").isdecimal()]


def _requested(config: Any) -> dict[str, Any]:
    return {k: v for k, v in to_dict(config).items() if k != "out"}


def _first_difference(found: Any, asked: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in {**asked, **found}:
            path = f"{key}.{name}" if key else name
            if different := _first_difference(found.get(name), asked.get(name), path):
                return different
        return None
    return None if found == asked else (key, found, asked)
