"""What the product says when a person's input cannot be used: got, wanted, next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Input that cannot be used: a file, a configuration, a dataset, a checkpoint.

    The message is one sentence that says what was given, what is wanted and what to do next. The command line
    prints it without a traceback and exits with code 2.
    """


def require_between(name: str, value: int | float | None, low: int | float, high: int | float) -> None:
    """Raise a UserError unless `value` is None or a number from `low` to `high`; NaN is not."""
    if value is not None and not low <= value <= high:
        raise UserError(f"{name} must be between {low:.10g} and {high:.10g}, got {value}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? Known: ..."`` for an unknown name, nearest match first."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = f"Known: {', '.join(names) or 'none'}." if len(names) <= 15 else "See --help for all of them."
    return f"; {hint}{listed}" if hint else f". {listed}"


def missing_extra(module: str, extra: str) -> UserError:
    """Return the error for an optional package that is not installed."""
    return UserError(f"{module!r} is not installed; install it with: pip install 'latentact[{extra}]'.")


EXTRAS = {
    "accelerate": "lerobot",
    "diffusers": "lerobot",
    "gymnasium": "envs",
    "gym_pusht": "envs",
    "hydra": "train",
    "lerobot": "lerobot",
    "lightning": "train",
    "minigrid": "envs",
    "omegaconf": "train",
    "plotly": "report",
    "shapely": "envs",
    "tensorboard": "train",
    "timm": "features",
    "transformers": "features",
    "wandb": "wandb",
}
"""Optional packages and the extra that installs each."""
