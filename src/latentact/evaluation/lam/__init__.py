"""Evaluation of latent action models."""
