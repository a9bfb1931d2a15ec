"""What gRPC's asyncio context reports about a call; its types say less than is true."""

import time
from typing import Any

import grpc

from darkroom_server.core.job import DEADLINE_SLACK_SECONDS

Context = grpc.aio.ServicerContext[Any, Any]


def deadline_of(context: Context) -> float | None:
    """The caller's deadline in ``time.monotonic`` seconds, None without one."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def has_expired(context: Context) -> bool:
    """Whether a cancelled call was cancelled by its deadline; gRPC makes no difference."""
    remaining: float | None = context.time_remaining()
    return remaining is not None and remaining <= DEADLINE_SLACK_SECONDS
