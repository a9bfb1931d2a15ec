"""Creates a token and its entry for the token file."""

import secrets
from hashlib import sha256

from darkroom_server.core.errors import StartupError
from darkroom_server.security.token_file import NAME

PREFIX = "darkroom_"
"""Identifies the text as our token, for people and for secret scanners."""

TOKEN_BYTES = 32


def create_token(name: str) -> str:
    """Return a new token for ``name`` and its lines for the file; raises ``StartupError``."""
    if not NAME.fullmatch(name):
        raise StartupError("token: the name must be 1 to 64 of A-Z a-z 0-9 . _ -")
    token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    return (
        f"The token for {name} (it is not shown again):\n\n{token}\n\n"
        "Its lines for the file of --tokens:\n\n"
        f'[[token]]\nname = "{name}"\nsha256 = "{sha256(token.encode()).hexdigest()}"'
    )
