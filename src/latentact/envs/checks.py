"""Checks before a policy acts in an environment, shared by all commands."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from latentact.envs.distract import Distraction
from latentact.envs.spec import VIEWS, EnvSpec, env_spec, make_env
from latentact.errors import UserError
from latentact.types import ActionSpace

log = logging.getLogger(__name__)

RANGES = {
    "episodes": (1, 1_000_000),
    "demos": (2, 1_000_000),
    "record": (0, 1_000_000),
    "max_steps": (0, 2**31 - 1),
    "extra_steps": (0, 1_000_000),
    "seed": (0, 2**31 - 1),
}
"""Minimum and maximum of settings shared by commands."""


def check_ranges(**settings: int) -> None:
    """Raise a UserError if a setting is outside its `RANGES`."""
    for name, value in settings.items():
        low, high = RANGES[name]
        if not low <= value <= high:
            raise UserError(f"{name} must be between {low} and {high}, got {value}.")


def check_step_limit(env: EnvSpec, max_steps: int) -> None:
    """Raise a UserError if neither the environment nor `max_steps` (0: none) ends an episode."""
    if not env.time_limit and not max_steps:
        raise UserError(
            f"{env.name} must have a time limit, got max_episode_steps=None. Set the maximum number of steps "
            "per episode with --max-steps (in compare: max_steps=N)."
        )


def try_step(name: str, *, view: str, distract: Distraction, seed: int) -> None:
    """Reset an environment and take a random action, so that failures show before hours of training.

    Raises:
        UserError: distractors are requested and not supported.
        EnvError: it cannot be reset, stepped or rendered.
    """
    env = make_env(name, view=view, distract=distract)
    try:
        env.reset(seed=seed)
        env.action_space.seed(seed)
        env.step(env.action_space.sample())
    finally:
        env.close()


def check_compatible(
    env: EnvSpec,
    source: str,
    *,
    actions: ActionSpace,
    cameras: Sequence[str],
    channels: int = 3,
    state_size: int = 0,
) -> None:
    """Raise a UserError if a policy, or a policy trained on a dataset, cannot act in an environment.

    Every class of a discrete action must be an action of the environment. A policy may have fewer than the
    environment, if `ActionSpace.values` lists them. If each side has one camera, they are matched regardless
    of their names, unless the name is that of the environment's other view.

    Args:
        env: the environment.
        source: name of the policy or dataset, for the message.
        actions: its action space.
        cameras: required camera keys; "": any.
        channels: channels of the required frames.
        state_size: dimensions of the required robot state; 0: none.
    """
    if not _same_actions(actions, env.action_space):
        raise UserError(
            f"{source} has {_described(actions)}, but {env.name} expects {_described(env.action_space)}. "
            "Choose the environment it was trained for, or give demonstrations of that environment."
        )
    if state_size not in (0, len(env.state_names)):
        raise UserError(
            f"{source} needs a robot state of {state_size} dimensions, but {env.name} has "
            f"{len(env.state_names)}. Choose the environment it was trained for, or train with "
            "policy.network.use_state=false."
        )
    if channels != 3:
        raise UserError(
            f"{source} needs frames of {channels} channels, but {env.name} has RGB. Train it on RGB frames."
        )
    if len(cameras) > 1:
        raise UserError(
            f"{source} must use one camera, as {env.name} has only {env.camera}, got {', '.join(cameras)}. "
            "Train it again with one of them as its only camera."
        )
    camera = next(iter(cameras), "")
    if camera in ("", env.camera):
        return
    for view in VIEWS:
        if env_spec(env.name, view=view).camera == camera:
            raise UserError(
                f"{source} was trained on {camera}, but {env.name} has {env.camera}. "
                f"Use --view {view} (in compare: view={view})."
            )
    log.info("%s: camera %s is used as %s", env.name, env.camera, camera)


def _same_actions(policy: ActionSpace, env: ActionSpace) -> bool:
    if policy.kind != env.kind:
        return False
    if not policy.discrete or not (policy.values or env.values):
        return policy.size == env.size
    known, possible = (set(space.values or range(space.size)) for space in (policy, env))
    return known <= possible and (bool(policy.values) or known == possible)


def _described(space: ActionSpace) -> str:
    if not space.discrete:
        return f"a {space.size}-D continuous action"
    first, last = (space.values[0], space.values[-1]) if space.values else (0, space.size - 1)
    return f"one of {space.size} discrete actions ({first} to {last})"
