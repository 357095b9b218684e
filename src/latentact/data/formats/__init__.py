"""One file per format on disk; `latentact.data.format` says how to add one."""
