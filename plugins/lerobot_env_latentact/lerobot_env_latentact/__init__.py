"""Environments of latentact for LeRobot: `--env.type=latentact --env.task=babyai/GoToRedBall`."""

from lerobot_env_latentact.config_latentact import LatentactEnv

__all__ = ["LatentactEnv"]
