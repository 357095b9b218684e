"""Latent action models, one file each; a new file here joins the registry."""
