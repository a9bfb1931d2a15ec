"""Other servers of many models: their processes, and the clients that send them the trace."""
