"""One file per format on disk; see `latentact.data.format` for how to add one."""
