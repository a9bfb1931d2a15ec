"""How to run a model on this machine: presets, placement, measurements."""
