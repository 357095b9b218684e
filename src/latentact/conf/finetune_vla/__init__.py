"""Experiments of one stage."""
