"""Engines: where the units of a labeling job are encoded. One file each with a function `Engine`."""
