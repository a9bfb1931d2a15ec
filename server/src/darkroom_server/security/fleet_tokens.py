"""The token of a server of a fleet: it speaks for the callers of its own.

A server puts a new key into the ledger whenever it opens it, so a role that may read the ledger can
call it for any caller; such a process could read their prompts there anyway.
"""

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from secrets import token_urlsafe

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import Unauthenticated
from darkroom_server.security.tokens import Tokens

PREFIX = "fleet."


def new_fleet_key() -> str:
    """A key that nobody can guess."""
    return token_urlsafe(32)


def fleet_token(key: str, caller: str) -> str:
    """The token for calls of ``caller`` to the server with ``key``."""
    return f"{PREFIX}{key}.{urlsafe_b64encode(caller.encode()).decode()}"


class FleetTokens(Tokens):
    """The callers of a token file, and other servers that show ``key`` and name their caller."""

    def __init__(self, path: str, key: str) -> None:
        super().__init__(path)
        self._key = key

    def caller(self, token: str | None) -> Caller:
        """As ``Tokens.caller``; a caller of another server has no more rights than its name."""
        if not token or not token.startswith(PREFIX):
            return super().caller(token)
        key, _, name = token[len(PREFIX) :].rpartition(".")
        if not hmac.compare_digest(key.encode(), self._key.encode()):
            raise Unauthenticated("the key of the fleet is of an earlier start of this server")
        return Caller(name=urlsafe_b64decode(name).decode())
