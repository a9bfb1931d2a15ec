"""A fresh token, and the lines that let it in."""

import secrets
from hashlib import sha256

from darkroom_server.core.errors import StartupError
from darkroom_server.security.token_file import NAME

PREFIX = "darkroom_"
"""Tells people, and programs that look for leaked secrets, what the text is."""

TOKEN_BYTES = 32


def create_token(name: str) -> str:
    """A new token for ``name``, and its lines for the token file; raises ``StartupError``."""
    if not NAME.fullmatch(name):
        raise StartupError("token: the name must be 1 to 64 of A-Z a-z 0-9 . _ -")
    token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    return (
        f"The token for {name}, which is shown this once:\n\n{token}\n\n"
        "The lines for the file that --tokens names:\n\n"
        f'[[token]]\nname = "{name}"\nsha256 = "{sha256(token.encode()).hexdigest()}"'
    )
