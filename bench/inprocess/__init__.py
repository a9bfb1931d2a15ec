"""What is measured without a network: diffusers' ``pipe()`` and Darkroom's engine."""
