"""Suspended pipelines: diffusers' own ``__call__``, batched at its calls of shared modules."""
