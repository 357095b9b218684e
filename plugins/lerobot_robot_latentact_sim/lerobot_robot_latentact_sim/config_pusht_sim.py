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
    """Seed of the start positions of block and finger."""
    image_size: int = 96
    """Height and width of the camera `top` in pixels."""
    realtime: bool = False
    """Whether the simulation runs in real time, at ten steps per second, or one step per action."""
    fault: str = "none"
    """Injected fault: `get_observation` blocks, raises, returns NaN for a position, or drops the image."""
    fault_after: int = 0
    """Number of observations before the fault."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        if self.fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(FAULTS)}, got {self.fault!r}")
        if self.image_size < 16:
            raise ValueError(f"image_size must be at least 16 pixels, got {self.image_size}")
