"""Pictures that callers send: kept by digest for a while, and decoded in worker processes."""
