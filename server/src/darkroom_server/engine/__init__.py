"""The engine: holds the models and runs batches of samples. Knows torch, not gRPC."""
