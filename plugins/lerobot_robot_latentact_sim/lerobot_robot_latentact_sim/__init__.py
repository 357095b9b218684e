"""A simulated robot for LeRobot, `--robot.type=pusht_sim`: PushT behind the `Robot` interface."""

from lerobot_robot_latentact_sim.config_pusht_sim import PushTSimConfig
from lerobot_robot_latentact_sim.pusht_sim import PushTSim

__all__ = ["PushTSim", "PushTSimConfig"]
