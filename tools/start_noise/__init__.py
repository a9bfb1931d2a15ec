"""Starts the server beside a process that uses every core, and compares what it chose."""
