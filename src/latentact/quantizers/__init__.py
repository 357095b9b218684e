"""Bottlenecks of latent action models, one file per kind.

Add one: a new file with a `BottleneckConfig`, registered in `QUANTIZERS`, that builds a
`Quantizer`.
"""
