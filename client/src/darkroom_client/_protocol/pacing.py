"""How a batch adapts to a server that cannot accept more now (AIMD, as in TCP)."""

import logging
import math
import random
import time

from darkroom_client._errors import DarkroomError, DeadlineUnreachable, Overloaded, QuotaExceeded
from darkroom_client._types.connection import Retry

log = logging.getLogger("darkroom_client")

FIRST_PAUSE_SECONDS = 0.5
"""After a rejection without ``retry_after``; each further try that is rejected doubles it."""

LONGEST_PAUSE_SECONDS = 5.0


class BatchPacer:
    """How many requests of a batch may be at the server, and when the next one may start.

    At first ``concurrency`` requests. A rejection reduces that to the number that the server has,
    and stops new starts for ``retry_after``, or until a request of the batch ends. Then one may
    try. Each end raises the number again, by one in as many ends.

    ``timeout`` is that of each request. A rejected request waits as if it had never been sent, so
    its timeout starts again. It fails with its error when nothing has moved for ``timeout``
    seconds: no request of the batch is at the server, and none has ended.
    """

    def __init__(self, concurrency: int, timeout: float | None, retry: Retry) -> None:
        self._most = concurrency
        self._timeout = timeout
        self._waits = retry.enabled
        self._limit = float(concurrency)
        self._running = 0
        # Whether a request was rejected since the last end, and how many tries were made since.
        self._rejected = False
        self._tries = 0
        self._paused_until = 0.0
        self._moved_at = time.monotonic()

    def wait(self) -> float | None:
        """Seconds until a request may start, 0 for now; None until a running one ends."""
        if self._running >= (self._most if self._rejected else int(self._limit)):
            return None
        return max(0.0, self._paused_until - time.monotonic())

    def started(self) -> None:
        """A request starts."""
        if not self._running and not self._rejected:
            self._moved_at = time.monotonic()
        self._running += 1
        if self._rejected:
            # One try, and its answer decides: the next may start after another pause.
            self._tries += 1
            self._paused_until = time.monotonic() + self._backoff()

    def ended(self, error: DarkroomError | None = None) -> bool:
        """A request ended; returns whether to send it again, because of ``error``."""
        self._running -= 1
        now = time.monotonic()
        if error is None or not self._is_not_now(error):
            held = max(self._limit, self._running + 1.0)
            self._limit = min(float(self._most), held + 1.0 / held)
            self._rejected, self._tries = False, 0
            self._paused_until, self._moved_at = 0.0, now
            return False
        self._rejected = True
        self._limit = float(max(1, self._running))
        pause, remaining = error.retry_after or self._backoff(), math.inf
        if self._timeout is not None and not self._running:
            remaining = max(0.0, self._moved_at + self._timeout - now)
        self._paused_until = now + min(pause, remaining)
        log.info(
            "rejected (%s), %d of the batch at the server: next try in %.2f s",
            error.reason or error.code,
            self._running,
            self._paused_until - now,
        )
        return remaining > 0.0

    def _is_not_now(self, error: DarkroomError) -> bool:
        return self._waits and is_not_now(error, self._timeout)

    def _backoff(self) -> float:
        grown = FIRST_PAUSE_SECONDS * 2.0 ** min(self._tries, 8)
        return min(grown, LONGEST_PAUSE_SECONDS) * random.uniform(0.8, 1.2)


def is_not_now(error: DarkroomError, timeout: float | None) -> bool:
    """Whether the same request may be accepted later, with the same ``timeout``.

    A full queue, a used-up quota; or a deadline that the queue makes unreachable, if the request
    alone fits into ``timeout``. (A model that loads is waited for by each call itself.)
    """
    if isinstance(error, DeadlineUnreachable):
        if timeout is None or error.estimate is None or error.queue_wait is None:
            return True
        return error.estimate - error.queue_wait <= timeout
    return isinstance(error, Overloaded | QuotaExceeded)
