"""Bearer tokens: whom each belongs to. Of the token itself, only a hash is known."""

import hmac
from datetime import UTC, datetime
from hashlib import sha256

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import Unauthenticated
from darkroom_server.security.reloading_file import ReloadingFile
from darkroom_server.security.token_file import read_tokens

NO_TOKEN = "this server asks for a token: send it as metadata, authorization: Bearer TOKEN"
UNKNOWN_TOKEN = "this server knows no such token, or not any more: ask its operator for a new one"


class Tokens:
    """The callers of a token file, which is read again when it changes.

    The constructor raises ``StartupError`` for a file that makes no sense. Where a later one makes
    none, that is logged, and the tokens known before stay.
    """

    def __init__(self, path: str) -> None:
        self._tokens = ReloadingFile("tokens", [path], lambda: read_tokens(path))

    def caller(self, token: str | None) -> Caller:
        """Whose token it is; raises ``Unauthenticated``."""
        if not token:
            raise Unauthenticated(NO_TOKEN)
        digest = sha256(token.encode()).digest()
        found = None
        # All of them are compared, whichever it is: how long it takes tells nothing.
        for known in self._tokens.current():
            if hmac.compare_digest(known.digest, digest):
                found = known
        if found is None:
            raise Unauthenticated(UNKNOWN_TOKEN)
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise Unauthenticated(f"the token expired at {found.expires.isoformat()}")
        return found.caller
