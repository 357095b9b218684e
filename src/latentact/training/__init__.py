"""The training loop, run folders and training checkpoints."""
