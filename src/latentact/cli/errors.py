"""Errors on the command line: one line, and exit code 2 for bad input."""

from __future__ import annotations

import errno
import sys
from typing import Any, NoReturn

import typer

from latentact.errors import EXTRAS, UserError, missing_extra
from latentact.io.atomic import disk_full

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""Exceptions of Typer for unknown commands and flags, and for values of the wrong type."""
PATH_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
"""errno values of invalid user paths."""
MAX_CHARACTERS = 1000
"""Maximum length of a printed message, in characters."""


def exit_with(error: BaseException) -> NoReturn:
    """Print a user error as one line and exit with code 2; re-raise any other error."""
    if isinstance(error, USAGE_ERROR) and not str(error):  # no arguments: the help has been printed
        sys.exit(2)
    message = describe(error)
    if message is None:
        raise error
    line = " ".join(message.split())
    if len(line) > MAX_CHARACTERS:
        line = f"{line[: MAX_CHARACTERS - 300]} [...] {line[-290:]}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def describe(error: BaseException) -> str | None:
    """Return the message of an error that the user can correct; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, USAGE_ERROR):
        return _usage_message(error)
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        return str(missing_extra(name, EXTRAS[name])) if name in EXTRAS else None
    if isinstance(error, OSError):
        if disk_full(error):
            return "the disk is full; free some space and re-run the command."
        if error.errno in PATH_ERRORS and error.filename:
            return f"{error.filename}: {error.strerror}; choose another path."
    return None


def _usage_message(error: Any) -> str:
    """Describe an unknown command or flag, or a value of the wrong type."""
    command = error.ctx.info_name if error.ctx and error.ctx.parent else ""
    message, parameter = error.format_message(), getattr(error, "param", None)
    if parameter and error.message:
        expected = error.message.partition(", unable")[0].removeprefix("Input should be ")
        message = f"{parameter.opts[0]} must be {expected}, got another value"
    help_command = " ".join(filter(None, ("latentact", command, "--help")))
    return f"{' '.join(message.split()).rstrip('.')}; see {help_command}."
