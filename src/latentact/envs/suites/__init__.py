"""Environment suites, one file each; a new file here joins the registry."""
