"""Estimates, overload and the HTTP door, asked by ``python -m bench.serving NAME``."""
