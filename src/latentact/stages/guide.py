"""Inspect and edit guides: `latentact guide info|edit|blend|concat PATH... --out FILE`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from latentact.config import Between, OneOf, check_bounds
from latentact.errors import UserError, require_one_of
from latentact.guidance.edits import EDITS, apply_edit, blend
from latentact.guidance.guide import SUFFIX, Guide

ACTIONS = ("info", "edit", "blend", "concat")


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """Describe a guide, edit it, blend guides or join them."""

    action: Annotated[str, OneOf(ACTIONS)]
    """info: describe guides; edit: apply operations; blend: weighted mean; concat: one after the other."""
    paths: tuple[str, ...]
    """Guides: files or folders that `imitate` or this command wrote."""
    out: str = ""
    """Output file (*.safetensors), or folder; an older guide is replaced."""
    apply: tuple[str, ...] = ()
    """edit: operation, may be given several times, in order: slice=3:40, replace=3:9,FILE, scale=0.5,
    set-code=3:9,5, time-warp=2, interpolate=FILE,0.5, smooth=5."""
    weights: str = ""
    """blend: weights of the guides; empty: equal."""
    transition: Annotated[int, Between(0, 100_000)] = 0
    """concat: steps between two guides, in which the latent action changes linearly."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("ACTION", self.action, ACTIONS)
        check_bounds(self)
        if not self.paths:
            raise UserError(
                "PATHS must name at least one guide, got none. Give the output folder of latentact imitate."
            )
        for name, action in (("apply", "edit"), ("weights", "blend"), ("transition", "concat")):
            if getattr(self, name) and self.action != action:
                raise UserError(f"--{name} must be empty for {self.action}, got a value. It is for {action}.")
        if self.action == "edit" and (len(self.paths) != 1 or not self.apply):
            raise UserError(
                f"edit needs one guide and --apply, got {len(self.paths)} guides and {len(self.apply)} "
                f"operations. Give an operation, for example --apply {EDITS['scale']}."
            )
        if self.action in ("blend", "concat") and len(self.paths) < 2:
            raise UserError(f"{self.action} needs at least two guides, got one. Give all of them as PATHS.")
        if self.action == "info" and self.out:
            raise UserError(f"--out must be empty for info, got {self.out}. Leave it out.")
        if self.action != "info" and not self.out:
            raise UserError(
                f"--out must be a file *{SUFFIX} or a folder, got none. Give the place of the new guide."
            )
        if self.out and (Path(self.out).suffix or SUFFIX) != SUFFIX:
            raise UserError(
                f"--out must be a file *{SUFFIX} or a folder, got {self.out}. Change its suffix to {SUFFIX}."
            )


def run(config: GuideConfig) -> dict[str, Any]:
    """Return a description of each guide; except for `info` the new guide is written and described.

    Raises:
        UserError: a guide is missing or damaged, the guides do not match, or an operation does not fit.
    """
    guides = [Guide.load(path) for path in config.paths]
    if config.action == "info":
        about = zip(config.paths, guides, strict=True)
        return {"guides": [{"path": path, **guide.about()} for path, guide in about]}
    if config.action == "edit":
        made = functools.reduce(apply_edit, config.apply, guides[0])
    elif config.action == "blend":
        made = blend(guides, config.weights or ",".join("1" * len(guides)), "--weights")
    else:
        made = functools.reduce(lambda a, b: a.concat(b, config.transition), guides)
    out = Path(config.out)
    if out.is_dir() == (out.suffix == SUFFIX) and out.exists():
        kind, other = ("file", "folder") if out.is_dir() else ("folder", "file")
        raise UserError(f"--out must be a {kind}, got the {other} {out}. Choose a new name.")
    made.save(out)
    return {"path": config.out, "guides": [{"path": config.out, **made.about()}]}


def summary(guide: dict[str, Any]) -> list[str]:
    """Return a guide's description in lines."""
    spec = guide["spec"]
    codes = f", {guide['codes']} of {spec['codebook_size']} codes used" if spec["codebook_size"] else ""
    seconds = f" ({guide['seconds']:.1f} s)" if guide["seconds"] else ""
    first = (
        f"{guide['path']}: {guide['latent_actions']} latent actions{seconds} of {spec['model']}, "
        f"{spec['tokens']} x {spec['token_dim']} values over {spec['frame_gap_s']:g} s{codes}"
    )
    return [first, *(f"  {line}" for line in guide["provenance"])]
