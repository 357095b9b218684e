"""The entry point `latentact`."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings

from latentact.cli.commands import NOT_RESUMABLE, app
from latentact.cli.errors import USAGE_ERROR, exit_with
from latentact.errors import UserError
from latentact.preemption import watch


def main() -> None:
    """Run the command line.

    Exit code 2 and one sentence for bad input, 130 when interrupted, 75 when preempted.
    """
    watch()
    gc.set_threshold(50_000, 20, 50)  # by default, a seventh of the start-up goes into searching for garbage
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _silence_libraries()
    try:
        code = app(standalone_mode=False)
    except (UserError, USAGE_ERROR, ModuleNotFoundError, OSError) as error:
        exit_with(error)
    if code == 130:  # Typer's exit code of Ctrl-C
        resumes = not {*sys.argv[1:2]} & NOT_RESUMABLE
        print(f"interrupted{'; re-run the command to resume' if resumes else ''}", file=sys.stderr)
    sys.exit(code or 0)


def _silence_libraries() -> None:
    """Keep banners and warnings of libraries off the terminal."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if sys.argv[1:2] not in (["record"], ["relabel"]):  # which open a window
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed", "datasets", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|pygame|gymnasium|lerobot)(\.|$)")
