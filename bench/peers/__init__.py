"""Darkroom beside the servers that people would use instead, over the wire."""
