"""LeRobot policies of latentact: `latentact`, `lam_vla`, `lam_diffusion` and `lam_act`.

LeRobot imports this package by its name when one of its commands starts. The processor is imported here too:
LeRobot rebuilds a checkpoint's processors by the registered names of their steps.
"""

from lerobot_policy_latentact import processor_lam
from lerobot_policy_latentact.configuration_lam import LamActConfig, LamDiffusionConfig
from lerobot_policy_latentact.configuration_lam_vla import LamVlaConfig
from lerobot_policy_latentact.configuration_latentact import LatentactConfig

__all__ = ["LamActConfig", "LamDiffusionConfig", "LamVlaConfig", "LatentactConfig", "processor_lam"]
