"""The folder next to an output that holds unfinished work, locked for one process and one set of settings."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from latentact.errors import UserError

SETTINGS = "settings.json"


@contextmanager
def locked_staging(staging: Path, out: Path, settings: dict[str, Any], what: str) -> Generator[None]:
    """Create and lock a staging folder within the block.

    Args:
        staging: the folder.
        out: output of the work, for messages.
        settings: JSON values that must be equal when the work is resumed.
        what: noun for the work, such as "recording".

    Raises:
        UserError: it cannot be created, is in use, or holds work with other settings.
    """
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{staging} cannot be created: {error.strerror}. Choose another folder.") from error
    try:
        lock = FileLock(staging / "lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"{out} is in use by another {what}. Wait for it or choose another folder."
        ) from error
    with lock:
        note = staging / SETTINGS
        if not note.exists():
            draft = note.with_suffix(".tmp")
            draft.write_text(json.dumps(settings))
            draft.replace(note)
        if json.loads(note.read_text()) != settings:
            raise UserError(f"{staging} holds an unfinished {what} with other settings. Delete or finish it.")
        yield
