"""The models that are loaded on demand: described before, and loaded beside running jobs."""
