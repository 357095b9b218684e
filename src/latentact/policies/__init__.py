"""Policies; add one by a new file with a config registered in `latentact.policies.contract.POLICIES`."""
