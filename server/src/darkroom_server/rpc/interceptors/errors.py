"""Exceptions to statuses: no exception's text reaches a caller by accident."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import structlog

from darkroom_server.core.errors import DarkroomError
from darkroom_server.rpc.context import Context
from darkroom_server.rpc.errors import ErrorStatus, internal_error, status_of
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method

log = structlog.get_logger(__name__)


class Errors(ContextInterceptor):
    """Turns domain errors into statuses, and the rest into INTERNAL and a log entry."""

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Catch what the handler raises."""
        return self._around(method, context)

    @asynccontextmanager
    async def _around(self, method: Method, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AbortError:
            raise  # The handler chose its status itself.
        except DarkroomError as error:
            await _end(context, status_of(error))
        except Exception:
            # gRPC would send the exception's text to the caller.
            log.exception("handler failed", service=method.service, method=method.name)
            await _end(context, internal_error())


async def _end(context: Context, status: ErrorStatus) -> None:
    try:
        await context.abort_with_status(_beside_trailers(context, status))
    except grpc.aio.InternalError:
        # The caller has disconnected, and gRPC has not noticed yet.
        raise asyncio.CancelledError from None


def _beside_trailers(context: Context, status: ErrorStatus) -> ErrorStatus:
    """``status`` with the trailers that other interceptors set, which an abort would drop."""
    trailers = (*context.trailing_metadata(), *status.trailing_metadata)
    return replace(status, trailing_metadata=trailers)
