"""Robots: how one is opened, the safety layer, and the loop that drives it at a fixed rate."""
