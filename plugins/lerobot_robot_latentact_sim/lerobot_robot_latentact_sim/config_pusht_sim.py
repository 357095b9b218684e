"""Settings of the simulated robot."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.robots import RobotConfig

FAULTS = ("none", "block", "raise", "nan", "drop")


@RobotConfig.register_subclass("pusht_sim")
@dataclass(kw_only=True)
class PushTSimConfig(RobotConfig):
    """Settings of the simulated robot."""

    seed: int = 0
    """Where the block and the finger start."""
    image_size: int = 96
    """Height and width of the camera `top` in pixels."""
    realtime: bool = False
    """Whether the world goes on by itself, ten steps a second, or by one step per action."""
    fault: str = "none"
    """What goes wrong: `get_observation` blocks, raises, gives NaN for a position, or drops the picture."""
    fault_after: int = 0
    """Observations that go well before it does."""

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        super().__post_init__()
        if self.fault not in FAULTS:
            raise ValueError(f"fault is {self.fault!r}; wanted one of {', '.join(FAULTS)}")
        if self.image_size < 16:
            raise ValueError(f"image_size is {self.image_size}; wanted at least 16 pixels")
