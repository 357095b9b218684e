"""Learners, one file each: algorithms that act in an environment while they learn."""
