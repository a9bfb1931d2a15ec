"""The trace that a call belongs to (W3C Trace Context)."""

import re
import secrets
from dataclasses import dataclass

TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
"""https://www.w3.org/TR/trace-context/#traceparent-header; later versions may append fields."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A trace by its id, and the caller's span in it, both in hexadecimal digits.

    ``span_id`` is empty if the trace begins with this call.
    """

    trace_id: str
    span_id: str = ""
    sampled: bool = True


def new_trace() -> TraceContext:
    """A trace that begins here."""
    return TraceContext(secrets.token_hex(16))


def parse_traceparent(text: str) -> TraceContext | None:
    """The caller's trace; None if the text is not a valid traceparent."""
    found = TRACEPARENT.fullmatch(text)
    if found is None or (found[1] == "00" and found[5]):
        return None
    if not (int(found[2], 16) and int(found[3], 16)):
        return None
    return TraceContext(found[2], found[3], sampled=bool(int(found[4], 16) & 1))
