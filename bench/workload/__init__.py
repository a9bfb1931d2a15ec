"""What is requested, and when: the load that every measured system gets."""
