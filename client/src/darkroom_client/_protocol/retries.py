"""When to make a call again, and which error ends it: for unary calls and for streams."""

import logging
import math
import random
import time

from darkroom_client._errors import DarkroomError, DeadlineExceeded, TLSError, Unavailable
from darkroom_client._protocol.rpc_errors import is_bare, unreachable
from darkroom_client._types.connection import Retry

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
