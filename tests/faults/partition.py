"""A path between two programs that a test can cut, as a network partition does."""

import asyncio
from contextlib import suppress
from typing import Self

CHUNK = 65536


class Link:
    """Forwards connections from a port of its own to ``port`` of this machine.

    While it is cut, bytes wait, new connections do not reach the other side, and neither side
    learns that the other has closed: nothing is rejected, as if the packets were lost.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._whole = asyncio.Event()
        self._whole.set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @classmethod
    async def to(cls, port: int) -> Self:
        """A link that forwards by now."""
        link = cls(port)
        link._server = await asyncio.start_server(link._accept, "127.0.0.1", 0)
        return link

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self._server
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> None:
        """Lose everything from now on."""
        self._whole.clear()

    def heal(self) -> None:
        """Forward again, first what waits."""
        self._whole.set()

    async def close(self) -> None:
        """End all connections."""
        assert self._server
        self._server.close()
        self.heal()
        while self._connections:
            for writer in self._writers:
                writer.transport.abort()
            await asyncio.wait(self._connections, timeout=0.1)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._forward(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        self._writers.add(writer)
        with suppress(ConnectionError):
            await self._whole.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(back)
            self._writers.add(back)
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        for each in writers:
            self._writers.discard(each)
            each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(CHUNK):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        await self._whole.wait()
        writer.close()
