"""Servers that share a ledger: they take over each other's jobs, and answer for all of them."""
