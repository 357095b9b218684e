"""Where a training runs: `cluster=local|slurm|...`; one file per kind of machine."""
