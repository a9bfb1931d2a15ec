"""Typed messages between the serving process and an engine's."""

import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from darkroom_server.core.events import ImageReady


class Channel:
    """One end of a duplex pipe; any thread may send, one receives.

    Messages are pickled, but for the bytes of an image: they follow their message as they are.
    Each direction is a stream of its own, so that a large image never holds up a cancel.
    """

    def __init__(self, descriptor: int) -> None:
        self._connection: Connection[Any, Any] = Connection(descriptor)
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Send ``message``; blocks while the pipe is full. Raises OSError if nobody listens."""
        with self._sending:
            if isinstance(message, ImageReady):
                data = message.image.data
                bare = replace(message, image=replace(message.image, data=b""))
                self._connection.send(bare)
                self._connection.send_bytes(data)
            else:
                self._connection.send(message)

    def receive(self) -> Any:
        """The next message; raises EOFError or OSError where the other end is gone."""
        message = self._connection.recv()
        if isinstance(message, ImageReady):
            data = self._connection.recv_bytes()
            return replace(message, image=replace(message.image, data=data))
        return message

    def close(self) -> None:
        """Let go of this end; the other end then reads an EOFError."""
        self._connection.close()
