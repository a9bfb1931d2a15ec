"""Real faults, through the real wire."""
