"""Messages between the serving process and the engine process."""
