"""Notifies systemd, or another service manager, of the server's state (sd_notify(3)).

The protocol is one datagram; the manager names the socket in NOTIFY_SOCKET. Without it nothing is
sent.
"""

import asyncio
import os
import socket

import structlog

from darkroom_server.dispatch import State

log = structlog.get_logger(__name__)

TEXTS = {
    State.LOADING: "STATUS=loading models",
    State.READY: "READY=1\nSTATUS=serving",
    State.RECOVERING: "STATUS=an engine restarts; new jobs wait for it",
    State.DRAINING: "STOPPING=1\nSTATUS=draining",
}


class ServiceManager:
    """Sends states, and sends WATCHDOG=1 while the event loop runs, if the manager asks for it.

    It belongs to the running event loop, and ends with it. A manager that does not read is logged,
    not waited for.
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._state: State | None = None
        own = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        # Twice in the time after which the manager kills this process.
        interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6 if own else 0.0
        if self._address and interval > 0.0:
            self._keep_alive(asyncio.get_running_loop(), interval)

    def publish(self, state: State) -> None:
        """Send ``state`` if it has changed."""
        if state is not self._state:
            self._state = state
            self._send(TEXTS[state])

    def _keep_alive(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._send("WATCHDOG=1")
        loop.call_later(interval, self._keep_alive, loop, interval)

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # "@" stands for the zero byte of an abstract address.
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.setblocking(False)
                connection.sendto(text.encode(), address)
        except OSError as error:
            log.warning("service manager not notified", why=str(error))
