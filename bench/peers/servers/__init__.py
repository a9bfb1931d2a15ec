"""The peers: each module is one server, run in an environment of its own."""
