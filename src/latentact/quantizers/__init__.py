"""Bottlenecks of latent action models, one file per kind.

Add one: a new file with a class that takes a `BottleneckConfig` and is registered in `QUANTIZERS`.
"""
