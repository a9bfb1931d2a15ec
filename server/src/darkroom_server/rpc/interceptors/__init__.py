"""What surrounds every call, one concern each."""
