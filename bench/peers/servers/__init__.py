"""One module for each peer's server, which runs in an environment of its own."""
