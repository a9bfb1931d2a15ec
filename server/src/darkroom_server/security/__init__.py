"""Who may come in: certificates, tokens, and where the server may listen without them."""
