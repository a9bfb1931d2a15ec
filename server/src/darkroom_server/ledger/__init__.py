"""Where accepted jobs stand: in memory, or in a file that outlives the server."""
