"""Environments, one file per suite: creation, specification and scripted experts."""
