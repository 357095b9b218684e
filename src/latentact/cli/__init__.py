"""The command line: `latentact <command>`. Commands are defined in `commands`, their flags by the stages."""

from latentact.cli.commands import app
from latentact.cli.entry import main

__all__ = ["app", "main"]
