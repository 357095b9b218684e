"""Flags that commands share, and what their values must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from latentact.config import LARGEST
from latentact.errors import UserError, require_between


def _not_empty(param: typer.CallbackParam, value: str) -> str:
    """Refuse an empty name, which would stand for the current folder."""
    if not value:
        raise UserError(f"{param.opts[0]} is empty; give a name.")
    return value


def _argument(text: str) -> Any:
    return typer.Argument(help=text, callback=_not_empty)


def _option(text: str) -> Any:
    return typer.Option(help=text, callback=_not_empty)


def between(low: int | float, high: int | float) -> Callable[[str], Any]:
    """Return a maker of flags for numbers from `low` to `high`: help text -> `typer.Option`."""

    def check(param: typer.CallbackParam, value: int | float | None) -> int | float | None:
        require_between(param.opts[0], value, low, high)
        return value

    return lambda text: typer.Option(help=text, callback=check)


ARGUMENT, NAME = _argument, _option
"""Makers of what must be given: help text -> `typer.Argument`, `typer.Option`."""
SEED = between(0, LARGEST)
PIXELS = between(0, 4096)
COUNT, LIMIT = between(1, 10**9), between(0, 10**9)
BATCH, WORKERS = between(1, 1 << 16), between(0, 1024)
RATE = SECONDS = between(0.0, 1e6)

Resolution = Annotated[int, PIXELS("Height and width of frames in pixels; 0: as they are.")]
View = Annotated[str, typer.Option(help="agent: what the agent sees; full: the whole world.")]
Distract = Annotated[
    str, typer.Option(help="Distractors, each from 0 to 1: background=0.5,shake=0.3,correlation=0.8.")
]
Camera = Annotated[str, typer.Option(help="Camera key; empty: the only one there is.")]
FrameGap = Annotated[float, SECONDS("Seconds between the frames of a transition; 0: the LAM's own.")]
TargetFps = Annotated[float, RATE("Frames per second to resample to; 0: the data's own.")]
Strict = Annotated[bool, typer.Option("--strict", help="An unreadable file is an error instead of skipped.")]
DropNonfinite = Annotated[
    bool,
    typer.Option(
        "--drop-nonfinite", help="Leave out rows whose state or action is missing, NaN or infinite."
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="fp32, bf16, int8 (faster, coarser), or auto: the fastest that keeps 99 % of the codes."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
