"""Evaluation of policies in environments."""
