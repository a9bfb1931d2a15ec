"""Darkroom's server: text-to-image diffusion models behind gRPC."""
