"""The parts of GAIL: discriminator, environment and PPO; they import stable-baselines3 where it is used."""
