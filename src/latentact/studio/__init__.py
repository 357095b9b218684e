"""The studio: latent actions to look at, name, edit, drive and label, in a browser or an exported page."""
