"""Labeling: latent actions of whole datasets and streams."""
