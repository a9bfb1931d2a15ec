"""The generated messages of package ``darkroom.ledger.v1``, which servers store and never send."""
