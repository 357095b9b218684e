"""Latent actions of whole datasets and streams."""
