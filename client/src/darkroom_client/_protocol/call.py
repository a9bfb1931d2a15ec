"""One prepared unary call, and its tries: what both clients share before and after the wire."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from darkroom_client._errors import (
    Cancelled,
    DarkroomError,
    DeadlineExceeded,
    TLSError,
    Unavailable,
)
from darkroom_client._protocol.retries import Retries, log
from darkroom_client._protocol.rpc_errors import (
    from_rpc_error,
    is_bare,
    may_retry,
    was_sent,
)
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Metadata
from darkroom_client._types.connection import Retry

A = TypeVar("A", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[A]):
    """What to send, where, and how to read the answer.

    ``fallback_method``: the method of the next try, if ``method`` found no server or lost it.
    ``survives_disconnect``: the server continues ``request_id`` after a lost connection, so a
    caller that stops waiting must cancel it. ``control``: it is short, and goes over the control
    channel, which job calls cannot block.
    """

    name: str
    method: Callable[[Stubs], Any]
    message: Message
    decode: Callable[[Any], A]
    address: str
    timeout: float | None
    metadata: Metadata
    retry: Retry
    request_id: str | None = None
    survives_disconnect: bool = False
    fallback_method: Callable[[Stubs], Any] | None = None
    control: bool = False

    @property
    def server_id(self) -> str:
        """Empty: the answer to a unary call comes too late to name the server."""
        return ""


@dataclass(frozen=True, slots=True)
class NextCall:
    """The next call to make; ``control``: over the control channel."""

    name: str
    method: Callable[[Stubs], Any]
    message: Message
    timeout: float | None
    control: bool = False


class CallTries(Generic[A]):
    """The state of one unary call: which try comes next, and which error ends it.

    It does no I/O (sans-IO). Both clients make the calls that ``next_call`` returns, and pass each
    error to ``on_failed``.
    """

    def __init__(self, call: Call[A]) -> None:
        self._call = call
        self._retries = Retries(
            call.name,
            retry=call.retry,
            timeout=call.timeout,
            address=call.address,
            request_id=call.request_id,
        )
        # The next try may go to servers whose health says that they accept no jobs.
        self._skip_health_check = False

    @property
    def remaining(self) -> float:
        """The remaining seconds of the call; infinite without a timeout."""
        return self._retries.remaining

    def next_call(self) -> NextCall:
        """The try to make now."""
        call = self._call
        timeout = self._retries.begin(call.name)
        method = call.method
        if self._skip_health_check and call.fallback_method is not None:
            method = call.fallback_method
        return NextCall(call.name, method, call.message, timeout, call.control)

    def on_failed(
        self, error: grpc.RpcError, *, connected: bool = True, tls_problem: str = ""
    ) -> float:
        """Return the seconds to wait before ``next_call``; raises the call's error if it is final.

        ``connected``: there is a connection to a server. ``tls_problem``: why the two ends do not
        agree on TLS; empty if that is not the cause.
        """
        call = self._call
        failure = from_rpc_error(
            error, address=call.address, timeout=call.timeout, request_id=call.request_id
        )
        if tls_problem:
            failure = TLSError(tls_problem, code=failure.code, request_id=call.request_id)
        skipped, self._skip_health_check = self._skip_health_check, False
        checked = call.fallback_method is not None and not skipped
        if checked and is_bare(failure, Unavailable) and not tls_problem:
            # No server accepts jobs, or it was lost: another one gives the reason, or accepts it.
            self._skip_health_check = True
            if not was_sent(error) and self._retries.remaining > 0:
                return 0.0
        if is_bare(failure, DeadlineExceeded):
            raise self._final(self._retries.expired(failure, connected=connected))
        self._retries.failed(failure)
        if not may_retry(error) or not self._retries.allowed(failure, accepted=False):
            raise self._final(failure)
        return self._retries.pause(failure)

    def needs_cancel(self, error: grpc.RpcError) -> bool:
        """Whether the job may still run after ``error``: the client's own deadline."""
        return (
            self._call.survives_disconnect
            and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            and is_bare(from_rpc_error(error, address="", timeout=None), DeadlineExceeded)
        )

    def answer(self, response: Any) -> A:
        """The answer in ``response``."""
        log.debug("%s: %s was answered", self._call.address, self._call.name)
        return self._call.decode(response)

    def _final(self, failure: DarkroomError) -> DarkroomError:
        log.debug("%s: %s failed: %s", self._call.address, self._call.name, failure)
        return failure


def client_closed_error(request_id: str | None) -> DarkroomError:
    """The error of a call during which the client was closed."""
    return Cancelled(
        "the call was cancelled: the client was closed while it ran",
        code="CANCELLED",
        request_id=request_id,
    )
