"""Kinds of models: one file for each family, and the registry."""
