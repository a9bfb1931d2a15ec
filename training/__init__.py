"""Trains the demo model: a small text-to-image pipeline on scenes drawn by code."""
