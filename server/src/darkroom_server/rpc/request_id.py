"""What a call is known by: in the log, in its answer, and as the name of the job it asks for."""

import re
from contextvars import ContextVar
from uuid import uuid4

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
RULE = "must be at most 64 of A-Z a-z 0-9 . _ -"

_current: ContextVar[str] = ContextVar("request_id", default="")


def current_request_id() -> str:
    """The id of the call that this task handles."""
    return _current.get() or new_request_id()


def set_request_id(id: str) -> None:
    """Note the call's id, for the rest of this task."""
    _current.set(id)


def new_request_id() -> str:
    """An id that nobody has."""
    return uuid4().hex
