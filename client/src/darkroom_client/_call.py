"""One call with one answer, prepared: all that both clients share before and after the wire."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from darkroom_client._errors import Cancelled, DarkroomError, DeadlineExceeded
from darkroom_client._rpc_errors import from_rpc_error
from darkroom_client._settings import Metadata
from darkroom_client._stubs import Stubs

A = TypeVar("A", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[A]):
    """What to send, where, and how to read the answer.

    ``keeps``: the server goes on with ``request_id`` when the connection is lost, so that
    somebody who leaves must say so.
    """

    method: Callable[[Stubs], Any]
    message: Message
    decode: Callable[[Any], A]
    address: str
    timeout: float | None
    metadata: Metadata
    request_id: str | None = None
    keeps: bool = False

    def failure(self, error: grpc.RpcError) -> DarkroomError:
        """What ``error`` means to the caller."""
        return from_rpc_error(
            error, address=self.address, timeout=self.timeout, request_id=self.request_id
        )

    def leaves_work(self, failure: DarkroomError) -> bool:
        """Whether the server may still draw after ``failure``, which is this side's own doing."""
        return self.keeps and not failure.reason and isinstance(failure, DeadlineExceeded)


def closed_under(request_id: str | None) -> DarkroomError:
    """What a caller learns when the client was closed under its call."""
    return Cancelled(
        "the call was cancelled: the client was closed while it ran",
        code="CANCELLED",
        request_id=request_id,
    )
