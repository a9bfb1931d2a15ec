"""The catalogue of models: which are in the engines' memory, and which are brought there next."""
