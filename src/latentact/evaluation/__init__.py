"""How good a model is: probes, reconstruction, codebook use, rollouts, comparison, report."""
