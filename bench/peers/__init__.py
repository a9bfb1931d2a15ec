"""Darkroom beside other servers, over the wire."""
