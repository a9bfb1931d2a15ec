"""Lets log entries of a call be found by the trace that the caller keeps of it."""

import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import structlog

from darkroom_server.rpc.context import Context, metadata_value
from darkroom_server.rpc.interceptors.around import Around, Method

METADATA_KEY = "traceparent"

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
"""https://www.w3.org/TR/trace-context/#traceparent-header; later versions may add to it."""


class Traces(Around):
    """Binds the caller's ``trace_id`` into the log; ignores what is none, as W3C says."""

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Read the metadata."""
        return self._around(context)

    @asynccontextmanager
    async def _around(self, context: Context) -> AsyncIterator[None]:
        trace_id = trace_id_of(metadata_value(context, METADATA_KEY) or "")
        if trace_id is not None:
            structlog.contextvars.bind_contextvars(trace_id=trace_id)
        yield


def trace_id_of(traceparent: str) -> str | None:
    """The trace's id, 32 hexadecimal digits; None where the text is no valid traceparent."""
    found = TRACEPARENT.fullmatch(traceparent)
    if found is None or (traceparent.startswith("00") and found[3]):
        return None
    return found[1] if int(found[1], 16) and int(found[2], 16) else None
