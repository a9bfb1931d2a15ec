"""Darkroom's engine beside diffusers' ``pipe()``."""
