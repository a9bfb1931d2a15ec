"""Holds the models and develops samples, one denoiser pass at a time; knows torch, not gRPC."""
