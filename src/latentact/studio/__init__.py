"""The studio: latent actions to look at, name, edit and drive, in a browser or an exported page."""
