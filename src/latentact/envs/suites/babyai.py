"""BabyAI: language tasks in a grid world, with minigrid's own bot (Chevalier-Boisvert et al., 2019).

Frames are rendered at 8 pixels per cell: 56x56 for the agent's own view of 7x7 cells, more for the whole
grid. A task succeeds when the episode ends with a reward.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.envs.adapt import adapt
from latentact.envs.distract import directions
from latentact.envs.spec import ENVS, EnvSpec, Expert, ExpertStuckError
from latentact.errors import UserError, did_you_mean, missing_extra
from latentact.types import ActionSpace

if TYPE_CHECKING:
    import gymnasium as gym

TILE = 8
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
FLOOR_BELOW = 100
"""Gray level below that of walls; the floor and the lines between its cells are darker."""
STATE = ("x", "y", "facing_right", "facing_down", "facing_left", "facing_up", "carrying")
SEARCHES_PER_STEP = 200
"""Maximum path searches of the bot per step; on a few levels its planning loop never ends."""


@ENVS.register("babyai")
class BabyAI:
    """Levels of minigrid with ids `BabyAI-<Level>-v0`, by level."""

    def check(self, name: str) -> None:
        """Raise a UserError if there is no such level."""
        level, levels = name.partition("/")[2], _levels()
        if level not in levels:
            near = difflib.get_close_matches(level, levels, n=5, cutoff=0.4) or levels
            raise UserError(f"unknown BabyAI level {level!r}{did_you_mean(level, near)}")

    def spec(self, name: str, view: str) -> EnvSpec:
        """Return the specification of a level; all have the same actions and state."""
        return EnvSpec(
            name=name,
            fps=10,
            camera=f"observation.images.{view}",
            action_space=ActionSpace(kind="discrete", size=len(ACTIONS)),
            action_names=ACTIONS,
            state_names=STATE,
            hold=ACTIONS.index("done"),
        )

    def make(self, name: str, resolution: int, view: str) -> gym.Env:
        """Return the level; frames show the agent's own 7x7 cells or the whole grid."""
        import gymnasium
        from minigrid.wrappers import RGBImgObsWrapper, RGBImgPartialObsWrapper

        base = gymnasium.make(_levels()[name.partition("/")[2]], disable_env_checker=True)
        grid: Any = base.unwrapped
        cells = grid.agent_view_size if view == "agent" else max(grid.width, grid.height)
        tile = -(-resolution // cells) if resolution else TILE
        wrap = RGBImgPartialObsWrapper if view == "agent" else RGBImgObsWrapper
        return adapt(
            wrap(base, tile_size=tile),
            name=name,
            pixels=lambda observation: observation["image"],
            resolution=resolution,
            state=lambda _: _state(grid),
            state_range=(np.zeros(len(STATE)), np.array([grid.width, grid.height, 1, 1, 1, 1, 1])),
            task=lambda: grid.mission,
            success=lambda reward, terminated, _: terminated and reward > 0,
            floor=_floor,
            heading=lambda action: directions(len(ACTIONS))[int(action)],
        )

    def expert(self, name: str, env: gym.Env, seed: int) -> Expert:
        """Return minigrid's bot, which makes no random choices."""
        return _Bot(env)


class _Bot(Expert):
    """Minigrid's bot; its failures are raised as `ExpertStuckError`."""

    def __init__(self, env: gym.Env) -> None:
        from minigrid.utils import baby_ai_bot

        class Bot(baby_ai_bot.BabyAIBot):
            searches = 0

            def _breadth_first_search(self, *args: Any, **kwargs: Any) -> Any:
                self.searches += 1
                if self.searches > SEARCHES_PER_STEP:
                    raise ExpertStuckError("the bot's planning does not end")
                return super()._breadth_first_search(*args, **kwargs)

        self._errors = (AssertionError, baby_ai_bot.DisappearedBoxError)
        self._bot = Bot(env.unwrapped)
        self._last: int | None = None

    def act(self, explore: np.random.Generator | None = None) -> int:
        self._bot.searches = 0
        try:
            action: Any = self._bot.replan(self._last)
        except self._errors as error:
            raise ExpertStuckError(str(error)) from error
        self._last = int(action) if explore is None else int(explore.integers(3))  # left, right or forward
        return self._last

    def report_action(self, action: int | np.ndarray) -> None:
        self._last = int(action)


def _levels() -> dict[str, str]:
    """Return the Gymnasium id of every level by its short name, e.g. `GoToRedBall`."""
    try:
        import gymnasium
        import minigrid  # noqa: F401  (registers its environments)
        from minigrid.envs.babyai.core import roomgrid_level
    except ModuleNotFoundError as error:
        raise missing_extra("minigrid", "envs") from error
    # minigrid prints a line to stdout for every level layout that it rejects
    roomgrid_level.__dict__["print"] = lambda *_: None
    ids = [name for name in gymnasium.registry if name.startswith("BabyAI-")]
    return {name.removeprefix("BabyAI-").rpartition("-")[0]: name for name in ids}


def _floor(frame: np.ndarray) -> np.ndarray:
    """Return a mask of the bare floor: dark and gray."""
    gray = (frame == frame[..., :1]).all(-1)
    return (gray & (frame[..., 0] < FLOOR_BELOW)).astype(np.float32)


def _state(grid: Any) -> np.ndarray:
    facing = np.eye(4)[grid.agent_dir]
    return np.array([*grid.agent_pos, *facing, grid.carrying is not None], np.float32)
