"""The I/O of both clients: channels, calls and their cancellation."""
