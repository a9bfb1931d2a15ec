"""ControlNets: what they add to the denoiser's calls, for the rows that ask for them."""
