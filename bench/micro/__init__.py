"""Micro-benchmarks: one question each, asked by ``python -m bench.micro NAME``."""
