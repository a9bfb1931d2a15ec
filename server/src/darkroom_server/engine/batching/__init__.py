"""Which samples share a batch, and the forward pass that serves it."""
