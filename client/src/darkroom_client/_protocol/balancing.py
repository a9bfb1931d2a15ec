"""Which of several servers gets the next call: power of two choices, by the backlog they report.

It does no I/O (sans-IO), so both clients share it.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

BACKLOG_KEY = "darkroom-backlog-seconds"
"""The trailer with the backlog. gRPC's C core hides the standard one, with the same figure."""

DETAILS_KEY = "grpc-status-details-bin"

JOB_STARTS = frozenset({"Generate", "GenerateStream", "SubmitGeneration"})

AVOIDED_SECONDS = 5.0
"""A server that did not answer gets no call for that long, if another one remains."""

UNREPORTED_SECONDS = 1.0
"""What an idle server counts as, for the calls that it got since its last report weigh on it too:
the report to `Generate` comes at the end of the job."""

GONE = 2

MAX_PLACES = 10_000
"""Jobs and uploads whose server is remembered."""


@dataclass(slots=True)
class _Server:
    """What is known of one server; times are ``time.monotonic`` seconds.

    ``finish_at``: when the backlog that it reported has finished. ``started``: calls that started
    jobs since that report. ``lost``: connections lost since it last answered. After the first, its
    jobs are looked for there once more; ``GONE`` means that it is down.
    """

    finish_at: float = 0.0
    started: int = 0
    failed_at: float = -inf
    lost: int = 0


class Balancer:
    """Chooses among ``servers`` servers, by index; safe to share between threads.

    A new job goes to the better of two servers picked at random: the shorter backlog, multiplied by
    the calls it got since it reported. Calls about a job or an upload go to the server that has it,
    others to the first server that answers.
    """

    def __init__(self, servers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._servers = [_Server() for _ in range(servers)]
        self._clock = clock
        self._places: dict[str, int] = {}
        self._next = 0
        self._lock = threading.Lock()

    def choose(self, method: str, message: Any) -> int:
        """The server for a call of ``method``, such as "Generate"."""
        with self._lock:
            now = self._clock()
            able = [
                index
                for index, each in enumerate(self._servers)
                if each.failed_at + AVOIDED_SECONDS < now
            ] or list(range(len(self._servers)))
            request_id = request_id_of(message)
            place = self._places.get(request_id)
            if method in JOB_STARTS:
                if place is not None and (place in able or self._servers[place].lost == 1):
                    self._servers[place].started += 1
                    return place  # A repeated request joins its job.
                chosen = self._of_uploads(message, able)
                if chosen is None:
                    chosen = self._better_of_two(able, now)
                self._servers[chosen].started += 1
                self._remember(request_id, chosen)
                return chosen
            if method == "UploadImage":
                chosen = self._better_of_two(able, now)
                self._remember(message.upload_id, chosen)
                return chosen
            if method == "EstimateGeneration":
                chosen = self._of_uploads(message, able)
                return able[0] if chosen is None else chosen
            if not request_id:
                return able[0]
            if place is not None and self._servers[place].lost < GONE:
                return place
            # In turn: one of them may know the job.
            self._next += 1
            return able[self._next % len(able)]

    def answered(self, server: int, trailers: Iterable[tuple[str, Any]]) -> None:
        """``server`` ended a call, with any status but UNAVAILABLE."""
        backlog = reported_backlog(trailers)
        with self._lock:
            known = self._servers[server]
            known.failed_at, known.lost = -inf, 0
            if backlog is not None:
                known.finish_at = self._clock() + backlog
                known.started = 0

    def unavailable(
        self, server: int, method: str, trailers: Iterable[tuple[str, Any]], *, found: bool
    ) -> None:
        """A call of ``method`` ended with UNAVAILABLE; ``found``: there was a connection for it.

        With details in ``trailers``, the server itself rejected it.
        """
        with self._lock:
            known = self._servers[server]
            known.failed_at = self._clock()
            if any(key == DETAILS_KEY for key, _ in trailers):
                known.lost = 0
            elif found:
                known.lost += 1
            elif method not in JOB_STARTS:
                # Those go by health too: a server that drains answers other calls.
                known.lost = GONE

    def rejected(self, request_id: str) -> None:
        """A server ended the call that started this job with an error, so it does not have it."""
        with self._lock:
            self._places.pop(request_id, None)

    def _better_of_two(self, able: list[int], now: float) -> int:
        # ``sample`` also mixes them, so that equal ones get the same.
        return min(random.sample(able, min(2, len(able))), key=lambda i: self._load(i, now))

    def _load(self, server: int, now: float) -> float:
        known = self._servers[server]
        return (max(0.0, known.finish_at - now) + UNREPORTED_SECONDS) * (known.started + 1)

    def _of_uploads(self, message: Any, able: list[int]) -> int | None:
        """The server that got an image which ``message`` names by its upload id."""
        for upload_id in _upload_ids(getattr(message, "generation", message)):
            place = self._places.get(upload_id)
            if place is not None and place in able:
                return place
        return None

    def _remember(self, key: str, server: int) -> None:
        self._places.pop(key, None)
        self._places[key] = server
        if len(self._places) > MAX_PLACES:
            del self._places[next(iter(self._places))]


def reported_backlog(trailers: Iterable[tuple[str, Any]]) -> float | None:
    """The seconds that a server reported, None without a report that can be read."""
    for key, value in trailers:
        if key == BACKLOG_KEY:
            try:
                seconds = float(value)
            except ValueError:
                return None
            return max(0.0, seconds) if isfinite(seconds) else None
    return None


def request_id_of(message: Any) -> str:
    """The id of the job that ``message`` is about, "" without one."""
    return str(getattr(getattr(message, "generation", message), "request_id", ""))


def _upload_ids(request: Any) -> list[str]:
    images = [request.image, request.mask_image, request.ip_adapter_image]
    images += [*request.reference_images, *(control.image for control in request.controls)]
    return [image.upload_id for image in images if image.upload_id]
