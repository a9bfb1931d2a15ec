"""Typed messages between the serving process and an engine's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from darkroom_server.core.events import ImageReady


class ChannelClosed(ConnectionError):
    """The other end is gone, or this one was closed."""


class Channel:
    """One end of a duplex pipe; any thread may send, one receives.

    Messages are pickled, but for the bytes of an image: they follow their message as they are.
    Each direction is a stream of its own, so that a large image never holds up a cancel.
    """

    def __init__(self, descriptor: int) -> None:
        self._connection: Connection[Any, Any] = Connection(descriptor)
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Send ``message``; blocks while the pipe is full. Raises ``ChannelClosed``."""
        with self._sending, _open():
            if isinstance(message, ImageReady):
                data = message.image.data
                bare = replace(message, image=replace(message.image, data=b""))
                self._connection.send(bare)
                self._connection.send_bytes(data)
            else:
                self._connection.send(message)

    def receive(self) -> Any:
        """The next message. Raises ``ChannelClosed``."""
        with _open():
            message = self._connection.recv()
            if isinstance(message, ImageReady):
                data = self._connection.recv_bytes()
                return replace(message, image=replace(message.image, data=data))
            return message

    def close(self) -> None:
        """Let go of this end, once no message is being sent; the other end reads of it.

        Whoever sends to a process that reads nothing is waited for: end that process first.
        """
        with self._sending:  # Its number may soon be another file's.
            self._connection.close()


@contextmanager
def _open() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise ChannelClosed("the channel is closed") from error
