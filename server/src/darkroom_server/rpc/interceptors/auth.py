"""Authentication by bearer token, and authorization of admin services."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

import structlog

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import NotAllowed, Reason, Unauthenticated
from darkroom_server.rpc.context import Context, Metadata
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
from darkroom_server.rpc.interceptors.call_context import metadata_value
from darkroom_server.security.tokens import Tokens
from darkroom_server.service.call_context import CURRENT_CALL

SCHEME = "bearer "

OPEN = frozenset({"grpc.health.v1.Health"})
"""Services that need no token: probes have none."""

ADMIN = frozenset(
    {
        "darkroom.v1.ServerService",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)


class AuthObserver(Protocol):
    """Receives each rejected call, on the event loop."""

    def call_rejected(self, reason: Reason) -> None:
        """Record it, without blocking and without raising."""


class Auth(ContextInterceptor):
    """Requires a token, and an admin's for admin services. Inside ``Errors``, after the context."""

    def __init__(self, tokens: Tokens, observer: AuthObserver) -> None:
        self._tokens = tokens
        self._observer = observer

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Set the caller; raises ``Unauthenticated`` or ``NotAllowed``."""
        return self._around(method, context)

    @asynccontextmanager
    async def _around(self, method: Method, context: Context) -> AsyncIterator[None]:
        if method.service not in OPEN:
            try:
                caller = self._caller(method.service, context.invocation_metadata() or ())
                structlog.contextvars.bind_contextvars(caller=caller.name)
                CURRENT_CALL.set(replace(CURRENT_CALL.get(), caller=caller))
            except (Unauthenticated, NotAllowed) as error:
                self._observer.call_rejected(error.reason)
                raise
        yield

    def allows(self, service: str, metadata: Metadata) -> bool:
        """Whether a call with this metadata may be made: its message is worth receiving."""
        try:
            self._caller(service, metadata)
        except (Unauthenticated, NotAllowed):
            return False
        return True

    def _caller(self, service: str, metadata: Metadata) -> Caller:
        caller = self._tokens.caller(_bearer_of(metadata))
        if service in ADMIN and not caller.admin:
            raise NotAllowed(
                f"{service} is for callers whose token says admin = true, and that of "
                f"{caller.name!r} does not"
            )
        return caller


def _bearer_of(metadata: Metadata) -> str | None:
    value = metadata_value(metadata, "authorization") or ""
    scheme, token = value[: len(SCHEME)], value[len(SCHEME) :].strip()
    return token if scheme.lower() == SCHEME else None
