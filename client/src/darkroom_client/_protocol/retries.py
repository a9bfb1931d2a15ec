"""A prepared call, and its retries until its timeout; unary or stream."""

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from darkroom_client._errors import (
    Cancelled,
    DarkroomError,
    DeadlineExceeded,
    TLSError,
    Unavailable,
)
from darkroom_client._protocol.rpc_errors import (
    from_rpc_error,
    is_bare,
    may_retry,
    unreachable,
    was_sent,
)
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._protocol.uploads import Upload, UploadState
from darkroom_client._settings import Metadata
from darkroom_client._types.connection import Retry

A = TypeVar("A", covariant=True)

log = logging.getLogger("darkroom_client")

LONGEST_OUTAGE = 120.0
"""A call without a timeout fails after that many seconds without any server."""

LAST_TRY_SECONDS = 0.05
"""No further try with less time than this: its answer would come too late."""

SHORT_TRY_SECONDS = 1.0
"""A server that rejects a call does so within this time. A try that the deadline ended later than
this was at work."""

BROKEN_CONNECTION_TRIES = 5
"""Tries after gRPC's own errors for a connection that broke, such as "Stream removed": they may
also come from a broken server, so they are limited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[A]):
    """What to send, where, and how to read the answer.

    ``fallback_method``: the method of the next try, if ``method`` found no server or lost it.
    ``survives_disconnect``: the server continues ``request_id`` after a lost connection, so a
    caller that stops waiting must cancel it. ``control``: it is short, and goes over the control
    channel, which job calls cannot block. ``uploads``: what the message names and the server needs
    before it.
    """

    name: str
    method: Callable[[Stubs], Any]
    message: Any
    decode: Callable[[Any], A]
    address: str
    timeout: float | None
    metadata: Metadata
    retry: Retry
    request_id: str | None = None
    survives_disconnect: bool = False
    fallback_method: Callable[[Stubs], Any] | None = None
    control: bool = False
    uploads: tuple[Upload, ...] = ()

    @property
    def server_id(self) -> str:
        """Empty: the answer to a unary call comes too late to name the server."""
        return ""


@dataclass(frozen=True, slots=True)
class NextCall:
    """The next call to make, after ``uploads``; ``control``: over the control channel."""

    name: str
    method: Callable[[Stubs], Any]
    message: Any
    timeout: float | None
    control: bool = False
    uploads: tuple[Upload, ...] = ()


class Retries:
    """The tries of one call, and the last reason why no server accepted it.

    Its clock starts at the first use of ``remaining``. ``failures``: failed tries since the last
    answer.
    """

    def __init__(
        self,
        name: str,
        *,
        retry: Retry,
        timeout: float | None,
        address: str,
        request_id: str | None,
    ) -> None:
        self.failures = 0
        self.outage: Unavailable | None = None
        self._name = name
        self._retry = retry
        self._timeout = timeout
        self._address = address
        self._request_id = request_id
        self._backoff = retry.initial_backoff
        self._ends_at: float | None = None
        self._tried_at = 0.0
        self._answered_at = 0.0

    @property
    def remaining(self) -> float:
        """The remaining seconds; infinite without a timeout."""
        now = time.monotonic()
        if self._ends_at is None:
            self._ends_at = math.inf if self._timeout is None else now + self._timeout
            self._answered_at = now
        return self._ends_at - now

    def begin(self, name: str) -> float | None:
        """Begin a try of the method ``name``; returns its timeout."""
        self._name = name
        self._tried_at = time.monotonic()
        log.debug("%s: call %s, request id %s", self._address, name, self._request_id)
        return None if math.isinf(self.remaining) else self.remaining

    def answered(self) -> None:
        """A server answered: the count of failures and the backoff start again."""
        self.failures = 0
        self.outage = None
        self._backoff = self._retry.initial_backoff
        self._answered_at = time.monotonic()

    def allowed(self, error: DarkroomError, *, accepted: bool) -> bool:
        """Whether to try again after ``error``, which says that no server has the call.

        Tries are unlimited after the job was accepted, or if ``Retry.attempts`` is None: until the
        time is up.
        """
        if not self._retry.enabled or isinstance(error, TLSError):
            return False
        if self._timeout is None and time.monotonic() - self._answered_at > LONGEST_OUTAGE:
            return False
        attempts = self._retry.attempts
        if isinstance(error, Unavailable):
            return accepted or attempts is None or self.failures < attempts
        return self.failures < (attempts or BROKEN_CONNECTION_TRIES)

    def failed(self, error: DarkroomError) -> None:
        """Count a failed try."""
        self.failures += 1
        if isinstance(error, Unavailable):
            self.outage = error
            if error.reason:
                # A server that loads or shuts down is not an outage.
                self._answered_at = time.monotonic()

    def pause(self, error: DarkroomError) -> float:
        """Seconds until the next try; raises ``error`` if there is no time for one.

        A server's ``retry_after`` is an estimate, so it does not end a call: if it is longer than
        the remaining time, half of that is waited.
        """
        backoff = self._backoff * random.uniform(0.8, 1.2)
        self._backoff = min(self._backoff * self._retry.multiplier, self._retry.max_backoff)
        wait, remaining = error.retry_after or backoff, self.remaining
        if wait >= remaining:
            if remaining < 2 * LAST_TRY_SECONDS:
                raise error
            wait = remaining / 2
        log.info(
            "%s: %s failed (%s), try %d in %.2f s, request id %s",
            self._address,
            self._name,
            error.reason or error.code,
            self.failures + 1,
            wait,
            self._request_id,
        )
        return wait

    def expired(self, error: DarkroomError, *, connected: bool) -> DarkroomError:
        """The error of a call whose time is up; ``error`` is the deadline's own.

        ``connected``: there is a connection to a server. Without one, the server is down. A try
        that the deadline ended early keeps the reason of the try before it.
        """
        short = time.monotonic() - self._tried_at < SHORT_TRY_SECONDS
        if self.outage is not None and (short or not connected):
            return self.outage
        if connected or not is_bare(error, DeadlineExceeded):
            return error
        return Unavailable(
            unreachable(self._address, f"no connection within {self._timeout:g} s"),
            code="UNAVAILABLE",
            request_id=self._request_id,
        )


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
        self._uploads = UploadState(call.uploads) if call.uploads else None
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
        uploads = self._uploads.take() if self._uploads is not None else ()
        return NextCall(call.name, method, call.message, timeout, call.control, uploads)

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
        if self._uploads is not None and self._uploads.lost(failure):
            return 0.0
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
