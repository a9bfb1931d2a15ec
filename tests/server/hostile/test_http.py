"""HTTP from callers that mean harm: no other caller waits, and nothing stays behind."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom_server.backends.fake_model import fake_image_model, fake_model
from darkroom_server.http import connection
from darkroom_server.http.messages.fields import FIELDS
from darkroom_server.http.messages.request import image_request
from tests.server.http.door import Door, door
from tests.server.uploads.pictures import plain

FAST = 0.2


ATTACKER = "127.0.0.2"
"""Another address of this machine; callers without a token are counted by their address."""


@asynccontextmanager
async def opened(
    there: Door, data: bytes = b"", address: str = "127.0.0.1"
) -> AsyncIterator[asyncio.StreamReader]:
    """A raw connection from ``address`` that has sent ``data``."""
    host, _, port = there.wire.server.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=(address, 0))
    try:
        writer.write(data)
        await writer.drain()
        yield reader
    finally:
        writer.close()


async def answer(there: Door, data: bytes, address: str = "127.0.0.1") -> bytes:
    """The whole answer to raw bytes, up to the end of the connection."""
    async with opened(there, data, address) as reader, asyncio.timeout(20):
        return await reader.read()


def post(headers: str, body: bytes = b"", path: str = "generations") -> bytes:
    head = f"POST /v1/images/{path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n"
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
            # The newest of the address is closed.
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
    post("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n", b"zz\r\n"),
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


@pytest.mark.parametrize("answered", [True, False])
async def test_a_body_that_becomes_malformed(
    answered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not an error of the server, whether its request was answered before or not."""
    kind = "text/plain" if answered else "application/json"
    path = "nothing" if answered else "generations"
    head = post(f"Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n", path=path)
    async with door() as there:
        host, _, port = there.wire.server.http_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + b"1\r\n{\r\n")
        if answered:
            assert b" 404 " in await reader.readuntil(b"\r\n")
        else:
            in_flight = there.wire.server.metrics.http.in_flight._value
            await there.wire.becomes(lambda: in_flight.get() == 1)
        with structlog.testing.capture_logs() as lines:
            writer.write(b"zz\r\n")
            rest = await reader.read()
        writer.close()
    assert rest.startswith(b"HTTP/1.1 400") is not answered
    assert not [line for line in lines if line["log_level"] in ("warning", "error")]
    assert not [each for each in caplog.records if each.levelname in ("WARNING", "ERROR")]


async def test_a_reader_that_stalls_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", FAST)
    async with door(fake={"auto": True}) as there:
        body = b'{"prompt": "a", "n": 4, "size": "1024x1024", "output_format": "raw_rgb"}'
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


@dataclass(frozen=True)
class Attack:
    """``count`` connections that send ``data`` and no more; ``limits`` are lowered for the test.

    ``unlimited``: what the server is without its limits on one caller.
    """

    data: bytes
    count: int
    limits: dict[str, int]
    unlimited: dict[str, Any]


def close_the_newest(connections: Collection[connection.Connection]) -> None:
    if len(connections) > connection.MAX_CONNECTIONS:
        max(connections, key=lambda each: each.number).transport.abort()


JSON_BEGUN = post("Content-Type: application/json\r\nContent-Length: 100\r\n", b"{")
FORM = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {}\r\n"
FORM_BEGUN = post(FORM.format(30 << 20), b"--b\r\n" + bytes(1 << 20), "edits")
BODY = "darkroom_server.http.body"
ATTACKS = {
    "headers": Attack(
        b"GET / HTTP/1.1\r\nHo",
        60,
        {"darkroom_server.http.connection.MAX_CONNECTIONS": 30},
        {"darkroom_server.http.connection.close_surplus": close_the_newest},
    ),
    "bodies": Attack(
        JSON_BEGUN,
        20,
        {f"{BODY}.MAX_RECEIVING": 10, f"{BODY}.MAX_RECEIVING_PER_CALLER": 4},
        {f"{BODY}.MAX_RECEIVING_PER_CALLER": 100},
    ),
    "forms": Attack(FORM_BEGUN, 20, {}, {f"{BODY}.MAX_RECEIVING_LARGE_PER_CALLER": 100}),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
async def test_an_attack_costs_no_other_caller(
    attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in attack.limits.items():
        monkeypatch.setattr(name, value)
    async with attacked(attack) as there:
        for _ in range(3):
            assert await served(there, seconds=20)
    # Without its limits on one caller, the server does not serve the others.
    for name, value in attack.unlimited.items():
        monkeypatch.setattr(name, value)
    async with attacked(attack) as there:
        assert not await served(there, seconds=1)


@asynccontextmanager
async def attacked(attack: Attack) -> AsyncIterator[Door]:
    """A server under ``attack``, which also receives malformed requests all the time."""
    async with door(fake={"auto": True, "models": [fake_image_model()]}) as there:

        async def malform() -> None:
            while True:
                for data in MALFORMED:
                    with suppress(ConnectionError):
                        async with opened(there, data, ATTACKER) as reader:
                            await reader.read(1)

        async with contexts(opened(there, attack.data, ATTACKER) for _ in range(attack.count)):
            malforming = asyncio.create_task(malform())
            yield there
            malforming.cancel()
            await asyncio.wait({malforming})


async def served(there: Door, seconds: float) -> bool:
    """Whether a caller with a new connection gets images over HTTP, by JSON and form, and gRPC."""
    json = b'{"prompt": "a star"}'
    kind = f"Content-Type: application/json\r\nContent-Length: {len(json)}\r\n"
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na star\r\n'
    form += b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    form += plain() + b"\r\n--b--\r\n"
    closing = "Connection: close\r\n"
    requests = (
        post(kind + closing, json),
        post(FORM.format(len(form)) + closing, form, "edits"),
    )
    try:
        async with asyncio.timeout(seconds):
            answers = [await answer(there, data) for data in requests]
    except (TimeoutError, ConnectionError):
        return False
    assert (await there.wire.generate()).images
    return all(each.startswith(b"HTTP/1.1 200") for each in answers)


TARGETS = (
    "/page/../door.py",
    "/page/..%2fdoor.py",
    "/page/%2e%2e/door.py",
    "/page/..%5cdoor.py",
    "/page//etc/passwd",
    "/page/page.js%00",
    "/page/page.js/..",
    "//localhost/page/page.js",
    "http://localhost/page/page.js",
    "/v1/images/results/../../../door.py",
    "/v1/images/results/anybody/..%2f..%2fx/0.png?expires=99999999999&signature=0",
)


async def test_paths_lead_nowhere_else() -> None:
    async with door() as there:
        for target in ("/page/page.js", *TARGETS):
            head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            found = await answer(there, head.encode())
            status = b"200" if target == "/page/page.js" else b"404"
            assert found.split()[1] == status, target


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50)
@given(st.data())
def test_no_body_breaks_the_reading(data: st.DataObject) -> None:
    names = st.sampled_from([*FIELDS]) | st.text(max_size=5)
    body = data.draw(st.dictionaries(names, VALUES, max_size=8))
    request = image_request(body, "", fake_model())
    unknown = [name for name in body if name not in FIELDS]
    assert len(request.violations) >= min(len(unknown), 20)
    repr(request.generation).encode()
