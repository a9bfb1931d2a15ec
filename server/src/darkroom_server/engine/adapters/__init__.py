"""LoRA adapters: rows of one denoiser batch with different ones, or none."""
