"""Bottlenecks of latent action models, one file per kind.

To add one, add a file with a `BottleneckConfig`, registered in `QUANTIZERS`, that builds a `Quantizer`.
"""
