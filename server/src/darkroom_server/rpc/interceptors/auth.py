"""Who calls, by the token that comes along; and who may not."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import structlog

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import NotAllowed, Reason, Unauthenticated
from darkroom_server.rpc.caller import set_caller
from darkroom_server.rpc.context import Context, metadata_value
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
from darkroom_server.security.tokens import Tokens

SCHEME = "bearer "

OPEN = frozenset({"grpc.health.v1.Health"})
"""Probes have no token."""

ADMIN = frozenset(
    {
        "darkroom.v1.ServerService",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)


class AuthObserver(Protocol):
    """Is told of each call that is not let in, on the event loop."""

    def call_refused(self, reason: Reason) -> None:
        """Count it; returns at once and never raises."""


class Auth(ContextInterceptor):
    """Lets in who has a token, and to what is for admins only who is one. Inside ``Errors``."""

    def __init__(self, tokens: Tokens, observer: AuthObserver) -> None:
        self._tokens = tokens
        self._observer = observer

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Raise ``Unauthenticated`` or ``NotAllowed``, or note the caller."""
        return self._around(method, context)

    @asynccontextmanager
    async def _around(self, method: Method, context: Context) -> AsyncIterator[None]:
        if method.service not in OPEN:
            try:
                set_caller(self._let_in(method, context))
            except (Unauthenticated, NotAllowed) as error:
                self._observer.call_refused(error.reason)
                raise
        yield

    def _let_in(self, method: Method, context: Context) -> Caller:
        caller = self._tokens.caller(_bearer_of(context))
        structlog.contextvars.bind_contextvars(caller=caller.name)
        if method.service in ADMIN and not caller.admin:
            raise NotAllowed(
                f"{method.service} is for callers whose token says admin = true, and that of "
                f"{caller.name!r} does not"
            )
        return caller


def _bearer_of(context: Context) -> str | None:
    value = metadata_value(context, "authorization") or ""
    scheme, token = value[: len(SCHEME)], value[len(SCHEME) :].strip()
    return token if scheme.lower() == SCHEME else None
