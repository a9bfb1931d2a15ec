"""Measurements of Darkroom. README.md lists the commands."""
