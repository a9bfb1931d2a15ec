"""One call with one answer, prepared: all that both clients share before and after the wire."""

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

    ``fallback_method``: how to ask again where ``method`` found no server, or, where the call is
    ``retried``, lost it or was turned away. ``survives_disconnect``: the server
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
        """When the call must have ended if it begins now, by ``time.monotonic``."""
        return math.inf if self.timeout is None else time.monotonic() + self.timeout

    def retry_call(self, error: grpc.RpcError, ends_at: float) -> Self | None:
        """The call to make after ``error``, to end in time; None where there is none."""
        left = ends_at - time.monotonic()
        asks = not was_sent(error) or (self.retried and may_retry(error))
        if self.fallback_method is None or not asks or left <= 0:
            return None
        timeout = None if math.isinf(left) else left
        return replace(self, method=self.fallback_method, fallback_method=None, timeout=timeout)

    def failure(self, error: grpc.RpcError) -> DarkroomError:
        """What ``error`` means to the caller."""
        return from_rpc_error(
            error, address=self.address, timeout=self.timeout, request_id=self.request_id
        )

    def needs_cancel(self, failure: DarkroomError) -> bool:
        """Whether the server may still draw after ``failure``, which is this side's own doing."""
        return self.survives_disconnect and is_bare(failure, DeadlineExceeded)


def client_closed_error(request_id: str | None) -> DarkroomError:
    """What a caller learns when the client was closed under its call."""
    return Cancelled(
        "the call was cancelled: the client was closed while it ran",
        code="CANCELLED",
        request_id=request_id,
    )
