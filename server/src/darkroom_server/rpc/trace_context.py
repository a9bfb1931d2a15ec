"""Which trace the call that is being handled belongs to."""

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
"""https://www.w3.org/TR/trace-context/#traceparent-header; later versions may add to it."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A trace, by its id, and the caller's span in it, both in hexadecimal digits.

    ``span_id`` is empty where the trace begins with this call.
    """

    trace_id: str
    span_id: str = ""
    sampled: bool = True


_current: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


def current_trace() -> TraceContext | None:
    """The trace of the call that this task handles, None where it has none."""
    return _current.get()


def set_trace(trace: TraceContext) -> None:
    """Note the call's trace, for the rest of this task."""
    _current.set(trace)


def new_trace() -> TraceContext:
    """A trace that begins here."""
    return TraceContext(secrets.token_hex(16))


def parse_traceparent(text: str) -> TraceContext | None:
    """The caller's trace; None where the text is no valid traceparent."""
    found = TRACEPARENT.fullmatch(text)
    if found is None or (found[1] == "00" and found[5]):
        return None
    if not (int(found[2], 16) and int(found[3], 16)):
        return None
    return TraceContext(found[2], found[3], sampled=bool(int(found[4], 16) & 1))
