"""Plain data that every other package may import: no grpc, no torch, nothing else of ours."""
