"""No call ends with a status that nobody chose."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
import structlog

from darkroom_server.core.errors import DarkroomError
from darkroom_server.rpc.context import Context
from darkroom_server.rpc.errors import internal_error, status_of
from darkroom_server.rpc.interceptors.around import Around, Method

log = structlog.get_logger(__name__)


class Errors(Around):
    """Turns domain errors into statuses, and the rest into INTERNAL and a log entry."""

    def around(self, method: Method, context: Context) -> AbstractAsyncContextManager[None]:
        """Catch what the handler raises."""
        return self._around(method, context)

    @asynccontextmanager
    async def _around(self, method: Method, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AbortError:
            raise  # The handler chose its status itself.
        except DarkroomError as error:
            await context.abort_with_status(status_of(error))
        except Exception:
            # gRPC would send the exception's text to the caller.
            log.exception("handler failed", service=method.service, method=method.name)
            await context.abort_with_status(internal_error())
