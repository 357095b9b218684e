"""Guides: the latent actions of a demonstration, aligned and followed."""
