"""Counts the calls that gRPC's core ends before a handler sees them."""

import json
import time
from collections import deque
from threading import Lock
from typing import Any

from grpc import _cython

WINDOW_SECONDS = 30.0
"""Core drops a call that has waited this long (``grpc.server_max_unrequested_time_in_server``), so
a call that is unseen for longer does not wait any more."""


class DroppedCalls:
    """Compares the calls that core started (channelz) with those that the interceptors saw.

    The interceptors increment ``seen``.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._server: int | None = None
        self._lock = Lock()
        self._dropped = 0
        self._readings: deque[tuple[float, int]] = deque()
        """When a reading was made, and how many calls were unseen: dropped, or still waiting."""

    def watch_newest_server(self) -> None:
        """Watch the server that was made last in this process."""
        self._server = _newest_server()

    def read(self) -> int:
        """The number of dropped calls, on any thread.

        It is the least number of unseen calls in the last ``WINDOW_SECONDS``, because calls that
        only wait are seen soon. It never falls.
        """
        with self._lock:
            now = time.monotonic()
            seen = self.seen  # Before the calls that started, so that no reading is too low.
            try:
                page = json.loads(_channelz().channelz_get_server(self._server))
            except ValueError:
                return self._dropped  # The server has stopped.
            started = int(page["server"]["data"].get("callsStarted", 0))
            self._readings.append((now, started - seen))
            while len(self._readings) > 1 and self._readings[1][0] <= now - WINDOW_SECONDS:
                self._readings.popleft()
            if self._readings[0][0] <= now - WINDOW_SECONDS:
                unseen = min(unseen for _, unseen in self._readings)
                self._dropped = max(self._dropped, unseen)
            return self._dropped


def _channelz() -> Any:
    """The functions behind the package ``grpcio-channelz``, which offers them as a service only."""
    core: Any = _cython
    return core.cygrpc


def _newest_server() -> int:
    newest, end = 0, False
    while not end:
        page = json.loads(_channelz().channelz_get_servers(newest + 1))
        ids = [int(server["ref"]["serverId"]) for server in page.get("server", ())]
        newest, end = max([newest, *ids]), page.get("end", False) or not ids
    return newest
