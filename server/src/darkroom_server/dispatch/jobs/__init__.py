"""One accepted job: its state, its subscriptions, its events and its outcome."""
