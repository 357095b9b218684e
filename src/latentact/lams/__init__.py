"""Latent action models; add one by a new file with a config registered in `latentact.lams.contract.LAMS`."""
