"""Environments, one file per suite: how to make them, what they are, and their scripted experts."""
