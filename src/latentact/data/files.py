"""The files at and below a folder: links are entered, cycles are not, and nothing is left out silently."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path


def files_below(path: Path, suffixes: Collection[str] | None = None) -> tuple[list[Path], dict[str, str]]:
    """Return the files at or below a path, sorted by name, and what was left out.

    Args:
        path: a folder, or a file, which is returned as it is.
        suffixes: endings to keep, lower case with the dot; None: every file, hidden ones too.

    Returns:
        The files, and a reason for each name (relative to `path`) that was left out: hidden, of another
        ending, a link to nothing, or a link back to a folder that it lies in.
    """
    if not path.is_dir():
        return [path], {}
    kept: list[Path] = []
    left_out: dict[str, str] = {}
    for file, reason in _walk(path, ()):
        if not reason and suffixes is not None:
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if hidden:
                reason = "hidden"
            elif file.suffix.lower() not in suffixes:
                reason = f"files that end in {file.suffix or 'nothing'} are not read"
        if reason:
            left_out[shown(file.relative_to(path))] = reason
        else:
            kept.append(file)
    return sorted(kept), left_out


def shown(name: str | os.PathLike[str]) -> str:
    """Return a file's name as text that can be printed: forward slashes, other bytes than UTF-8 escaped."""
    text = Path(name).as_posix()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, str]]:
    """Yield (file, reason to leave it out); `above` are the folders that this one lies in."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        yield folder, "a link to a folder that it lies in"
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield folder, f"the folder cannot be opened ({error.strerror})"
        return
    for entry in entries:
        path = Path(entry.path)
        if not path.exists():
            yield path, "a link to nothing"
        elif entry.is_dir():
            yield from _walk(path, (*above, here))
        elif entry.is_file():
            yield path, ""
        else:
            yield path, "not a regular file"
