"""TLS certificates, bearer tokens, and the policy for listening without TLS."""
