"""One prepared unary call: what both clients share before and after the wire."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import grpc
from google.protobuf.message import Message

from darkroom_client._errors import Cancelled, DarkroomError, DeadlineExceeded
from darkroom_client._protocol.rpc_errors import from_rpc_error, is_bare, may_retry, was_sent
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Metadata

A = TypeVar("A", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[A]):
    """What to send, where, and how to read the answer.

    ``fallback_method``: the method of the second try, if ``method`` found no server; or, for a
    ``retried`` call, if it lost its server or was rejected. ``survives_disconnect``: the server
    continues ``request_id`` after a lost connection, so a caller that stops waiting must cancel it.
    """

    method: Callable[[Stubs], Any]
    message: Message
    decode: Callable[[Any], A]
    address: str
    timeout: float | None
    metadata: Metadata
    request_id: str | None = None
    survives_disconnect: bool = False
    fallback_method: Callable[[Stubs], Any] | None = None
    retried: bool = False

    @property
    def server_id(self) -> str:
        """Empty: the answer to a unary call comes too late to name the server."""
        return ""

    def ends_at(self) -> float:
        """The deadline of the call if it begins now, in ``time.monotonic`` seconds."""
        return math.inf if self.timeout is None else time.monotonic() + self.timeout

    def retry_call(self, error: grpc.RpcError, ends_at: float) -> Self | None:
        """The call to make after ``error``, with the remaining time; None if there is none."""
        remaining = ends_at - time.monotonic()
        retries = not was_sent(error) or (self.retried and may_retry(error))
        if self.fallback_method is None or not retries or remaining <= 0:
            return None
        timeout = None if math.isinf(remaining) else remaining
        return replace(self, method=self.fallback_method, fallback_method=None, timeout=timeout)

    def failure(self, error: grpc.RpcError) -> DarkroomError:
        """``error`` as the client's own error."""
        return from_rpc_error(
            error, address=self.address, timeout=self.timeout, request_id=self.request_id
        )

    def needs_cancel(self, failure: DarkroomError) -> bool:
        """Whether the job may still run after ``failure``: the client's own deadline."""
        return self.survives_disconnect and is_bare(failure, DeadlineExceeded)


def client_closed_error(request_id: str | None) -> DarkroomError:
    """The error of a call during which the client was closed."""
    return Cancelled(
        "the call was cancelled: the client was closed while it ran",
        code="CANCELLED",
        request_id=request_id,
    )
