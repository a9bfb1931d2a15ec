"""From predictions to the next latents, for all samples of a batch at once."""
