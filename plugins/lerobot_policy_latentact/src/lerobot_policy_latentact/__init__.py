"""LeRobot policies conditioned on latent actions: `lam_diffusion` and `lam_act`.

LeRobot imports this package by its name when one of its commands starts. The processor is imported here too:
LeRobot rebuilds a checkpoint's processors by the registered names of their steps.
"""

from lerobot_policy_latentact import processor_latentact
from lerobot_policy_latentact.configuration_latentact import LamActConfig, LamDiffusionConfig

__all__ = ["LamActConfig", "LamDiffusionConfig", "processor_latentact"]
