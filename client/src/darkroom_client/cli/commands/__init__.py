"""The subcommands of ``darkroom``: one module for each, with its ``run``."""
