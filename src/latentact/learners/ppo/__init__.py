"""PPO of stable-baselines3 for policies; the modules that import it are imported where they are used."""
