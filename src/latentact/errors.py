"""User-facing errors: what was given, what is expected, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class UserError(Exception):
    """Invalid user input: a file, a configuration, a dataset or a checkpoint.

    The message states what was given, what is expected and how to fix it. The command line prints it without
    a traceback and exits with code 2.
    """


def require_between(name: str, value: int | float | None, low: int | float, high: int | float) -> None:
    """Raise a UserError unless `value` is None or between `low` and `high`; NaN is rejected."""
    if value is not None and not low <= value <= high:
        raise UserError(f"{name} must be between {low:.10g} and {high:.10g}, got {value}.")


def require_one_of(name: str, value: object, known: Collection[str]) -> None:
    """Raise a UserError unless `value` is one of a few names."""
    if value not in known:
        *others, last = known
        raise UserError(f"{name} must be {', '.join(others)} or {last}, got {value!r}.")


MIXTURE = "data.mixture is a setting of train-lam and train-policy. Give this command one dataset at a time."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? Known: ..."`` for an unknown name, with its closest match."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = f"Known: {', '.join(names) or 'none'}." if len(names) <= 15 else "See --help for all of them."
    return f"; {hint}{listed}" if hint else f". {listed}"


def missing_extra(module: str, extra: str) -> UserError:
    """Return the error for a missing optional package; it names the extra that installs the package."""
    return UserError(f"{module!r} is not installed; install it with: pip install 'latentact[{extra}]'.")


EXTRAS = {
    "accelerate": "lerobot",
    "diffusers": "lerobot",
    "envpool": "procgen",
    "gymnasium": "envs",
    "gradio": "studio",
    "h5py": "export",
    "gym_pusht": "envs",
    "hydra": "train",
    "lerobot": "lerobot",
    "lightning": "train",
    "metaworld": "metaworld",
    "minigrid": "envs",
    "num2words": "vla",
    "omegaconf": "train",
    "peft": "vla",
    "plotly": "report",
    "ray": "scale",
    "shapely": "envs",
    "stable_baselines3": "gail",
    "tensorboard": "train",
    "timm": "features",
    "transformers": "features",
    "wandb": "wandb",
    "xminigrid": "xland",
    "zarr": "export",
}
"""Optional module -> extra that installs it."""
