"""Stable Diffusion 1.4's architecture on a GPU."""
