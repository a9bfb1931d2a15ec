"""Between the client's plain data and the messages on the wire."""
