"""Measurements of Darkroom: each module with a ``main`` is one bench, the rest is theirs."""
