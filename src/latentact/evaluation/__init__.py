"""Evaluation: probes, reconstruction, codebook usage, rollouts and comparisons."""
