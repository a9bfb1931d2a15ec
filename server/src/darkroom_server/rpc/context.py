"""What gRPC's asyncio context reports about a call; its types say less than is true."""

from typing import Any

import grpc

from darkroom_server.core.job import DEADLINE_SLACK_SECONDS

Context = grpc.aio.ServicerContext[Any, Any]


def has_expired(context: Context) -> bool:
    """Whether a cancelled call was cancelled by its deadline; gRPC makes no difference."""
    remaining: float | None = context.time_remaining()
    return remaining is not None and remaining <= DEADLINE_SLACK_SECONDS
