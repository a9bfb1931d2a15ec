"""What a client sends and how it reads the answers; no I/O."""
