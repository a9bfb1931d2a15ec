"""Pixels to bytes, and the record that reproduces an image."""
