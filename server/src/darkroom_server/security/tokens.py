"""Looks up the caller of a bearer token. The server knows only hashes of tokens."""

import hmac
from datetime import UTC, datetime
from hashlib import sha256

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import Unauthenticated
from darkroom_server.security.reloading_file import ReloadingFile
from darkroom_server.security.token_file import read_tokens

NO_TOKEN = "this server needs a token: send it as metadata, authorization: Bearer TOKEN"
UNKNOWN_TOKEN = "the token is unknown or was removed: ask the server's operator for a new one"


class Tokens:
    """The callers of a token file, which is reloaded when it changes.

    The constructor raises ``StartupError`` for an invalid file. An invalid file later is logged,
    and the previous tokens stay.
    """

    def __init__(self, path: str) -> None:
        self._tokens = ReloadingFile("tokens", [path], lambda: read_tokens(path))

    def caller(self, token: str | None) -> Caller:
        """Return the caller of ``token``; raises ``Unauthenticated``."""
        if not token:
            raise Unauthenticated(NO_TOKEN)
        digest = sha256(token.encode()).digest()
        found = None
        # Compare with every token, so the time taken reveals nothing (timing attack).
        for known in self._tokens.current():
            if hmac.compare_digest(known.digest, digest):
                found = known
        if found is None:
            raise Unauthenticated(UNKNOWN_TOKEN)
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise Unauthenticated(f"the token expired at {found.expires.isoformat()}")
        return found.caller
