"""List the files of a folder: links are followed, cycles are not, and skipped files are reported."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path


def files_below(path: Path, suffixes: Collection[str] | None = None) -> tuple[list[Path], dict[str, str]]:
    """Return the files of a folder and its subfolders, sorted by name, and the skipped files.

    Args:
        path: folder; or a file, which is returned alone.
        suffixes: file name suffixes to keep, lower case with the dot; None: every file, including hidden
            ones.

    Returns:
        The files, and name (relative to `path`) -> reason for the skipped files: hidden, another suffix, a
        dangling link, or a link to a parent folder.
    """
    if not path.is_dir():
        return [path], {}
    kept: list[Path] = []
    skipped: dict[str, str] = {}
    for file, reason in _walk(path, ()):
        if not reason and suffixes is not None:
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if hidden:
                reason = "hidden"
            elif file.suffix.lower() not in suffixes:
                reason = f"unsupported suffix {file.suffix!r}"
        if reason:
            skipped[printable(file.relative_to(path))] = reason
        else:
            kept.append(file)
    return sorted(kept), skipped


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file name as printable text: forward slashes, bytes outside UTF-8 escaped."""
    text = Path(name).as_posix()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _walk(folder: Path, parents: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, str]]:
    """Yield (file, reason to skip it or ""); `parents` are (device, inode) of the parent folders."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in parents:
        yield folder, "a link to a parent folder"
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield folder, f"the folder cannot be opened ({error.strerror})"
        return
    for entry in entries:
        path = Path(entry.path)
        if not path.exists():
            yield path, "a dangling link"
        elif entry.is_dir():
            yield from _walk(path, (*parents, here))
        elif entry.is_file():
            yield path, ""
        else:
            yield path, "not a regular file"
