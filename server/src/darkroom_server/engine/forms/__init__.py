"""The forms in which a denoiser runs: eager, or compiled for the machine."""
