"""HTTP from callers that mean harm: no other caller waits, and nothing stays behind."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom_server.backends.fake_model import fake_model
from darkroom_server.http import connection
from darkroom_server.http.messages.fields import FIELDS
from darkroom_server.http.messages.request import image_request
from tests.server.http.door import Door, door

FAST = 0.2


@asynccontextmanager
async def opened(there: Door, data: bytes = b"") -> AsyncIterator[asyncio.StreamReader]:
    """A raw connection that has sent ``data``."""
    host, _, port = there.wire.server.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        yield reader
    finally:
        writer.close()


async def answer(there: Door, data: bytes) -> bytes:
    """The whole answer to raw bytes, up to the end of the connection."""
    async with opened(there, data) as reader, asyncio.timeout(20):
        return await reader.read()


def post(headers: str, body: bytes = b"") -> bytes:
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n"
    return head.encode() + body


async def test_slow_requests_are_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", FAST)
    monkeypatch.setattr(connection, "BODY_SECONDS", FAST)
    async with door(fake={"auto": True}) as there:
        assert await answer(there, b"") == b""
        assert await answer(there, b"GET / HT") == b""
        assert await answer(there, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n") == b""
        # After a first request, too.
        again = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea"
        assert (await answer(there, again)).startswith(b"HTTP/1.1 200")
        json = "Content-Type: application/json\r\nContent-Length: 100\r\n"
        assert await answer(there, post(json, b"{")) == b""
        # A body that nobody reads ends too.
        assert (await answer(there, post("Content-Length: 100\r\n", b"{"))) == b""
        assert (await there.generate()).status_code == 200


async def test_a_slow_body_gets_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom_server.http.body.BODY_SECONDS", FAST)
    async with door() as there:
        json = "Content-Type: application/json\r\nContent-Length: 100\r\n"
        assert b"408" in (await answer(there, post(json, b"{"))).splitlines()[0]


async def test_slow_bodies_of_one_caller_delay_no_other_door() -> None:
    async with door(fake={"auto": True}) as there:
        json = "Content-Type: application/json\r\nContent-Length: 100\r\n"
        async with contexts(opened(there, post(json, b"{")) for _ in range(100)):
            assert (await there.client.get("/health")).status_code == 200
            assert (await there.wire.generate()).images


@asynccontextmanager
async def contexts(
    all_of_them: Iterable[AbstractAsyncContextManager[object]],
) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for each in all_of_them:
            await stack.enter_async_context(each)
        yield


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 20)
    async with door(fake={"auto": True}) as there:
        async with contexts(opened(there) for _ in range(20)):
            assert await answer(there, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
        for _ in range(100):
            if (await answer(there, CLOSING)).startswith(b"HTTP/1.1 200"):
                return
        raise AssertionError("the places did not become free")


CLOSING = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


MALFORMED = [
    b"\x00\x01\x02\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 5000,
    b"GET /" + b"a" * 40_000,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    post("Content-Length: 2\r\nContent-Length: 3\r\n", b"{}"),
    post("Content-Length: -1\r\n"),
    post("Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    post("Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n"),
    post("Transfer-Encoding : chunked\r\n", b"0\r\n\r\n"),
    post(" Content-Length: 2\r\n", b"{}"),
    post("Content-Length: 2\nConnection: close\r\n", b"{}"),
    b"PRI * HTTP/2.0\r\n\r\n",
]


async def test_malformed_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", FAST)
    monkeypatch.setattr(connection, "BODY_SECONDS", FAST)
    monkeypatch.setattr("darkroom_server.http.server.IDLE_SECONDS", FAST)
    async with door(fake={"auto": True}) as there:
        for data in MALFORMED:
            found = await answer(there, data)
            assert not found or found.split()[1] in (b"400", b"415", b"421", b"501"), data
            # The rest does not become a second request.
            assert found.count(b"HTTP/1.1 ") <= 1, data
        assert (await there.generate()).status_code == 200
        assert there.wire.server.dispatcher.counts.accepted == 1


async def test_a_reader_that_stalls_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", FAST)
    async with door(fake={"auto": True}) as there:
        body = b'{"prompt": "a", "n": 16, "size": "1024x1024", "output_format": "raw_rgb"}'
        json = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        async with opened(there, post(json, body)):
            await there.wire.submitted.get()
            await there.wire.becomes(
                lambda: there.wire.server.metrics.http.in_flight._value.get() == 0
            )


async def test_malformed_requests_fill_no_log() -> None:
    async with door() as there:
        with structlog.testing.capture_logs() as lines:
            for _ in range(20):
                await answer(there, b"\x00\r\n\r\n")
    assert not [line for line in lines if line["log_level"] in ("warning", "error")]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100)
@given(st.data())
def test_no_body_breaks_the_reading(data: st.DataObject) -> None:
    names = st.sampled_from([*FIELDS]) | st.text(max_size=5)
    body = data.draw(st.dictionaries(names, VALUES, max_size=8))
    request = image_request(body, "", fake_model())
    unknown = [name for name in body if name not in FIELDS]
    assert len(request.violations) >= min(len(unknown), 20)
    repr(request.generation).encode()
