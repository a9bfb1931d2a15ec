"""Who makes the call that is being handled, under which id, in which trace."""

import re
from contextvars import ContextVar
from dataclasses import dataclass
from uuid import uuid4

from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.service.trace_context import TraceContext

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
RULE = "must be at most 64 of A-Z a-z 0-9 . _ -"


def new_request_id() -> str:
    """A unique id."""
    return uuid4().hex


@dataclass(frozen=True, slots=True)
class CallContext:
    """One call of any door. ``request_id`` is in its log lines, and names its job.

    ``protocol`` is "grpc" or "http". ``relayed``: another server of the ledger makes it for a
    caller of its own; it is answered for what is here, and goes no further.
    """

    request_id: str
    caller: Caller = ANONYMOUS
    trace: TraceContext | None = None
    protocol: str = "grpc"
    relayed: bool = False


CURRENT_CALL: ContextVar[CallContext] = ContextVar("call")
"""The call that this task handles; the doors set it before their handlers run."""
