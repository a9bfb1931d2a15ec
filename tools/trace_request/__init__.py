"""Trace one request through the server and the client, and check how long its way is."""
