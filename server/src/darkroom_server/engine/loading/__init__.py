"""From a model's id or folder to a model in memory."""
