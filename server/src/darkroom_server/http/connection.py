"""One connection of the HTTP port, with limits on what a caller may hold open."""

import asyncio
import itertools
import socket
from collections import Counter
from collections.abc import Collection
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from darkroom_server.dispatch import PeerAddresses

MAX_CONNECTIONS = 1000
"""Connections at once. One more closes the newest of the address that has the most."""

MAX_HEADER_BYTES = 16 * 1024
"""Of the request line and all headers together."""

HEADER_SECONDS = 20.0
"""From the first byte of a request, or the connection, to the end of the headers."""

BODY_SECONDS = 90.0
"""From the end of the headers to the end of the body, also of a body that nobody reads."""

IDLE_SECONDS = 75
"""For the next request on a connection."""

STALL_SECONDS = 60.0
"""A caller that reads nothing of an answer for this long is disconnected."""


ADDRESSES = PeerAddresses()
NUMBERS = itertools.count()


class Connection(H11Protocol):
    """Uvicorn's connection; closes itself if the other end sends or reads too slowly.

    A higher ``number`` is newer. ``address`` is that of the other end, as the limits count it.
    """

    number = 0
    address = ""
    _receive_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _receiving: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection; if there are too many now, close one."""
        super().connection_made(transport)
        # asyncio turns Nagle's algorithm off only for sockets made with IPPROTO_TCP. With it, the
        # body of an answer waits up to 40 ms for the acknowledgement of its head.
        accepted: socket.socket = transport.get_extra_info("socket")
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number = next(NUMBERS)
        self.address = ADDRESSES.address_of(self.client[0] if self.client else "", ())
        if len(self.connections) > MAX_CONNECTIONS:
            close_surplus(cast("Collection[Connection]", self.connections))
        self._limit_receiving()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        for timer in (self._receive_timer, self._send_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handle what arrived."""
        super().data_received(data)
        self._limit_receiving()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._limit_receiving()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, unless the answer to their request has begun."""
        if self.conn.our_state is h11.SEND_RESPONSE or self.conn.our_state is h11.IDLE:
            super().send_400_response(msg)
        if cast("object | None", self.cycle) is not None:
            self.cycle.disconnected = True  # Its handler has no caller any more.
            self.cycle.message_event.set()
        self.transport.close()

    def pause_writing(self) -> None:
        """The caller does not read as fast as the server writes."""
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The caller reads."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _limit_receiving(self) -> None:
        """Set the timer of the part of a request that is under way, if it is another part now."""
        receiving = self._part()
        if receiving == self._receiving:
            return
        self._receiving = receiving
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None
        if receiving is not None:
            seconds = HEADER_SECONDS if receiving == "headers" else BODY_SECONDS
            self._receive_timer = self.loop.call_later(seconds, self.transport.abort)

    def _part(self) -> str | None:
        """The part of a request that must arrive next; None while none must."""
        state: Any = self.conn.their_state
        if state is h11.IDLE:
            # An idle connection has uvicorn's own timer.
            first = cast("object | None", self.cycle) is None
            return "headers" if first or self.conn.trailing_data[0] else None
        return "body" if state is h11.SEND_BODY else None


def close_surplus(connections: Collection[Connection]) -> None:
    """Close the newest connection of the address that has the most, if there are too many.

    So an address that opens as many as it can closes its own, and nobody else's.
    """
    there = [each for each in connections if not each.transport.is_closing()]
    if len(there) <= MAX_CONNECTIONS:
        return
    ((address, _),) = Counter(each.address for each in there).most_common(1)
    of_address = (each for each in there if each.address == address)
    max(of_address, key=lambda each: each.number).transport.abort()
