"""Every call has an id, which is logged and goes back to the caller, whatever becomes of it."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import structlog
from google.protobuf.message import Message

from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.rpc.context import Context, metadata_value
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
from darkroom_server.rpc.request_id import REQUEST_ID, RULE, new_request_id, set_request_id

METADATA_KEY = "darkroom-request-id"
FIELD = "request_id"


class RequestIds(ContextInterceptor):
    """Takes a call's id from its message or else its metadata, and sends it back in the trailers.

    An id from the metadata is written into a message that has a place for one and holds none, so
    that it names the job too. The trailers and not the headers: headers would end gRPC's retries.
    """

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Name the call; raises ``InvalidRequest`` for metadata that cannot be an id."""
        return self._around(context, request)

    @asynccontextmanager
    async def _around(self, context: Context, request: Any) -> AsyncIterator[None]:
        sent = metadata_value(context, METADATA_KEY)
        named = _place_for_id(request)
        if named is not None and sent and REQUEST_ID.fullmatch(sent) and not getattr(named, FIELD):
            setattr(named, FIELD, sent)
        asked = getattr(named, FIELD) if named is not None else sent
        id = asked if asked and REQUEST_ID.fullmatch(asked) else new_request_id()
        set_request_id(id)
        structlog.contextvars.bind_contextvars(request_id=id)
        context.set_trailing_metadata(((METADATA_KEY, id),))
        if sent is not None and not REQUEST_ID.fullmatch(sent):
            # Not ignored: who sends an id counts on it to find the call, or the job, again.
            raise InvalidRequest([Violation(METADATA_KEY, f"metadata: {RULE}")])
        yield


def _place_for_id(request: Any) -> Message | None:
    """The message that names the call's job, itself or the one inside that asks for images."""
    if not isinstance(request, Message):
        return None  # A stream of messages.
    fields = request.DESCRIPTOR.fields_by_name
    if FIELD in fields:
        return request
    if "generation" in fields:
        return _place_for_id(request.generation)  # type: ignore[attr-defined]
    return None
