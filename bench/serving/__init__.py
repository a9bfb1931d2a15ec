"""Estimates and overload, asked by ``python -m bench.serving NAME``."""
