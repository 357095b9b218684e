"""Guides: extract, align and follow the latent actions of a demonstration."""
