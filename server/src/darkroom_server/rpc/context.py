"""What gRPC's asyncio context reports about a call; its types say less than is true."""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

from darkroom_server.core.job import DEADLINE_SLACK_SECONDS

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(slots=True)
class Answer:
    """``complete``: the whole answer was passed to gRPC, so the call has succeeded.

    A client may end a stream as soon as it has read the last message, before the status.
    """

    complete: bool = False


CURRENT_ANSWER: ContextVar[Answer] = ContextVar("CURRENT_ANSWER")
"""The answer of the current call."""

CURRENT_ADDRESS: ContextVar[str] = ContextVar("CURRENT_ADDRESS")
"""The address of the current call's caller, as the limits count it."""


def has_expired(context: Context) -> bool:
    """Whether a cancelled call was cancelled by its deadline; gRPC makes no difference."""
    remaining: float | None = context.time_remaining()
    return remaining is not None and remaining <= DEADLINE_SLACK_SECONDS
