"""Many models on one device: a production trace, for our server and for other policies."""
