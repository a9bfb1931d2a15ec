"""A peer that speaks HTTP/2 by hand: it sends what no gRPC library would, and reads on request."""

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, RST_STREAM, SETTINGS_FRAME, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 0x1, 0x4
INITIAL_WINDOW_SIZE = 4

SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """HPACK: literal fields, neither indexed nor compressed."""
    return b"".join(
        b"\0" + _length(len(name)) + name + _length(len(value)) + value for name, value in fields
    )


def _length(number: int) -> bytes:
    if number < 127:
        return bytes([number])
    number -= 127
    encoded = [127]
    while number >= 128:
        encoded.append(number % 128 + 128)
        number //= 128
    return bytes([*encoded, number])


def call_headers(method: str, *metadata: tuple[bytes, bytes]) -> bytes:
    """The header block of a gRPC call."""
    return header_block(
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/" + method.encode()),
            (b":authority", b"localhost"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            *metadata,
        ]
    )


def message(data: bytes) -> bytes:
    """A gRPC message with its prefix."""
    return b"\0" + struct.pack(">I", len(data)) + data


class Peer:
    """One connection; ``open`` and ``send`` write at once, ``frames`` reads."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._reader = reader
        self._next_stream = 1

    def open(self, method: str, *metadata: tuple[bytes, bytes], data: bytes | None = b"") -> int:
        """Begin a call and send its message; None sends no message. Returns the stream's number."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.send(HEADERS, END_HEADERS, stream, call_headers(method, *metadata))
        if data is not None:
            self.send(DATA, END_STREAM, stream, message(data))
        return stream

    def send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.writer.write(frame(kind, flags, stream, payload))

    def allow(self, stream: int, count: int) -> None:
        """Let the server send ``count`` bytes more on ``stream``."""
        self.send(WINDOW_UPDATE, 0, stream, struct.pack(">I", count))

    async def frames(self) -> AsyncIterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of each frame, until the server closes the connection."""
        while True:
            try:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            if head[3] == SETTINGS_FRAME and not head[4] & 1:
                self.send(SETTINGS_FRAME, 1, 0, b"")
            if head[3] == PING and not head[4] & 1:
                self.send(PING, 1, 0, payload)
            yield head[3], head[4], int.from_bytes(head[5:], "big"), payload

    async def ended(self, stream: int) -> bytes:
        """Wait for the end of ``stream``; its last header block, or its reset."""
        async for kind, flags, number, payload in self.frames():
            if number == stream and (
                kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM)
            ):
                return payload
        raise ConnectionError("the server closed the connection")


@asynccontextmanager
async def peer(
    address: str, *, window: int = 65535, source: str = "127.0.0.1"
) -> AsyncIterator[Peer]:
    """A peer whose streams have ``window`` bytes of flow control window at first."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
    try:
        writer.write(PREFACE)
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
        writer.write(frame(SETTINGS_FRAME, 0, 0, settings))
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()
