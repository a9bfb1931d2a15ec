"""A duplex channel of messages between the serving process and an engine process."""

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
    """One end of a duplex pipe; any thread may send, one thread receives.

    Messages are pickled, except the bytes of an image, which follow their message unpickled. Each
    direction is a separate stream, so a large image never delays a cancel.
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
        """Close this end; the other end's ``receive`` raises ``ChannelClosed``.

        Blocks until a pending send finishes; kill a process that no longer reads first.
        """
        with self._sending:  # A sender must not write to a descriptor number that is used again.
            self._connection.close()


@contextmanager
def _open() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise ChannelClosed("the channel is closed") from error
