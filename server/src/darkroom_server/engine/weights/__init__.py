"""The weights that an engine holds on its device and in the host's memory, each once."""
