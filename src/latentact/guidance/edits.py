"""Operations on guides as text, `scale=0.5`, for the command line."""

from __future__ import annotations

from collections.abc import Sequence

from latentact.errors import UserError, did_you_mean
from latentact.guidance.guide import Guide

EDITS = {
    "slice": "slice=3:40",
    "replace": "replace=3:9,FILE",
    "scale": "scale=0.5",
    "set-code": "set-code=3:9,5",
    "time-warp": "time-warp=2",
    "interpolate": "interpolate=FILE,0.5",
    "smooth": "smooth=5",
}
"""Operation -> example."""


def apply_edit(guide: Guide, text: str) -> Guide:
    """Return the guide after an operation `NAME=VALUE`; see `EDITS`.

    Raises:
        UserError: the operation is unknown, its value is invalid, or it does not fit the guide.
    """
    name, _, value = text.partition("=")
    name = name.replace("_", "-")
    if name not in EDITS:
        examples = ", ".join(EDITS.values())
        raise UserError(
            f"unknown operation {name!r}{did_you_mean(name, EDITS)} Operations look like {examples}."
        )
    first, _, rest = value.partition(",")
    file, _, last = value.rpartition(",")
    try:
        if name == "slice":
            steps = _steps(value)
            return guide.slice(steps.start, steps.stop)
        if name == "scale":
            return guide.scale(float(value))
        if name == "time-warp":
            return guide.time_warp(float(value))
        if name == "smooth":
            return guide.smooth(int(value))
        if name == "interpolate":
            return guide.interpolate(Guide.load(file), float(last))
        if name == "replace":
            return guide.replace(_steps(first), Guide.load(rest))
        codes = [int(code) for code in rest.split(",")]
        return guide.set_code(_steps(first), codes[0] if len(codes) == 1 else codes)
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{name} must look like {EDITS[name]}, got {text!r}. See latentact guide --help."
        ) from error


def blend(guides: Sequence[Guide], weights: str, flag: str) -> Guide:
    """Return the blend of guides with weights such as `0.5,0.5`.

    Raises:
        UserError: the weights are not one number per guide, or the guides do not match.
    """
    try:
        numbers = [float(each) for each in weights.split(",")]
    except ValueError as error:
        raise UserError(
            f"{flag} must be numbers such as 0.5,0.5, got {weights!r}. Give one number per guide."
        ) from error
    return Guide.blend(guides, numbers)


def _steps(text: str) -> range:
    start, _, stop = text.partition(":")
    return range(int(start), int(stop))
