"""Content digests, memoized by (path, size, modification time) so that files are hashed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def blake2b(*parts: bytes) -> str:
    """Return the hex digest of a sequence of byte strings; their boundaries are part of it."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Memo:
    """Memoized facts about the files of one dataset, valid while size and modification time are unchanged.

    Args:
        folder: folder of the memos; one file per dataset.
        dataset: path of the dataset.
    """

    def __init__(self, folder: Path, dataset: Path) -> None:
        """Load the memo of the dataset."""
        self._file = folder / f"{blake2b(os.fsencode(dataset.resolve()))}.json"
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        # missing, truncated by a full disk or damaged: start with an empty memo
        with suppress(OSError, ValueError, RecursionError):
            values = json.loads(self._file.read_text())
            if isinstance(values, dict) and values.get("digest") == _digest(values.get("known")):
                self._known = values["known"]

    def get(self, path: Path, what: str, find: Callable[[Path], Any]) -> Any:
        """Return `find(path)`, a JSON value; call `find` only for a new or changed file."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        key = f"{what}:{path.resolve()}"
        entry = self._known.get(key)
        if entry is None or entry[:2] != stamp:
            entry = self._known[key] = [*stamp, find(path)]
            self._changed = True
        return entry[2]

    def save(self) -> None:
        """Write the memo if it has changed."""
        if not self._changed:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"digest": _digest(self._known), "known": self._known}))
        draft.replace(self._file)
        self._changed = False


def _digest(known: Any) -> str:
    return blake2b(json.dumps(known).encode())
