"""Trains the LoRA adapters and the ControlNet of the demo model, and judges them."""
