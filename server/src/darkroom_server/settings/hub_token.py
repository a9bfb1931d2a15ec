"""The token for the model hub, a secret that comes from the environment."""

import os


def hub_token() -> str | None:
    """The token for the model hub, None if there is none."""
    # Empty in compose files without a token; secrets made with echo end with a newline.
    return os.environ.get("HF_TOKEN", "").strip() or None
