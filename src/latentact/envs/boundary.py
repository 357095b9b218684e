"""The boundary to third-party environments: their exceptions and invalid values become an `EnvError`."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.spec import EnvError
from latentact.errors import UserError, missing_extra

if TYPE_CHECKING:
    import gymnasium as gym

log = logging.getLogger(__name__)


def import_gymnasium() -> Any:
    """Return the module, or raise the UserError that names its extra."""
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise missing_extra("gymnasium", "envs") from error
    return gymnasium


@contextmanager
def env_errors(name: str, doing: str) -> Generator[None]:
    """Raise an environment's exceptions as an EnvError with its name: `{name} failed {doing}: ...`.

    This includes SystemExit, with which an environment would end the whole program. If the environment
    changes the working directory, it is restored, so that relative paths stay valid.
    """
    folder = ""
    with suppress(FileNotFoundError):  # it was removed
        folder = os.getcwd()
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # third-party code may raise anything
        message = " ".join(str(error).split()).rstrip(".")
        raise EnvError(
            f"{name} failed {doing}: {type(error).__name__}{message and ': '}{message}. "
            "Fix the environment, or choose another."
        ) from error
    finally:
        if folder:
            os.chdir(folder)


def close(env: gym.Env, name: str) -> None:
    """Close an environment; exceptions are only logged, so that finished episodes are kept."""
    try:
        with env_errors(name, "to close"):
            env.close()
    except EnvError as error:
        log.warning("%s", error)


def to_bool(value: Any, source: str) -> bool:
    """Return a flag that an environment reports: a boolean, or the number 0 or 1, also as array or tensor.

    Args:
        value: what it reports.
        source: the environment and the flag, for the message.

    Raises:
        EnvError: it is something else, such as a text or NaN.
    """
    single = value
    if hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # NumPy and torch: it has more than one element
            single = value.item()
    array = np.asarray(single)
    if array.dtype.kind not in "biuf" or array.size != 1 or array.item() not in (0, 1):
        raise EnvError(
            f"{source} must be a boolean or the number 0 or 1, got {value!r}. Fix the environment, or choose "
            "another."
        )
    return bool(array.item())
