"""The calls, the session and the errors of both clients, without I/O (sans-IO)."""
