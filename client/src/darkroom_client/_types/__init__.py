"""The public data types of the client."""
