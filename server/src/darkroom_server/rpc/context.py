"""What gRPC's asyncio context tells of a call, as it really is and not as its types say."""

from typing import Any

import grpc

from darkroom_server.core.job import DEADLINE_SLACK_SECONDS

Context = grpc.aio.ServicerContext[Any, Any]


def remaining_seconds(context: Context) -> float | None:
    """Seconds until the caller's deadline, 0 if it has passed, None without one."""
    return context.time_remaining()


def has_expired(context: Context) -> bool:
    """Whether a call that was cancelled was so by its deadline: gRPC makes no difference."""
    remaining = remaining_seconds(context)
    return remaining is not None and remaining <= DEADLINE_SLACK_SECONDS


def metadata_value(context: Context, key: str) -> str | None:
    """The first value of ``key`` that came with the call, None where there is none."""
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value.decode("ascii", "replace") if isinstance(value, bytes) else value
    return None


def status_name(context: Context) -> str | None:
    """The name of the status that was set, such as "NOT_FOUND"; None if none was."""
    code: Any = context.code()  # As it was set: a StatusCode, or its number.
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _NAMES.get(code)


_NAMES: dict[object, str] = {code.value[0]: code.name for code in grpc.StatusCode}
