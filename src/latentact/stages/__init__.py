"""Stages, one file each, read top to bottom; they meet through artifacts on disk only."""
