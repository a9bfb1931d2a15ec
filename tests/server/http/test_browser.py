"""A browser inside the network must not let a page of another origin use the server."""

import socket

import pytest

from darkroom_server.http.browser import BrowserRules
from darkroom_server.http.errors import HttpError
from tests.server.http.door import Door, door

APP = "https://app.example"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "[::1]:8000",
        "10.1.2.3",
        socket.gethostname(),
        "images.example:8000",
    ],
)
def test_own_hosts(host: str) -> None:
    BrowserRules(hosts=["images.example"]).check({"host": host})


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example", "a b", "[::1", "x/y"],
)
def test_other_hosts_are_rejected(host: str) -> None:
    with pytest.raises(HttpError) as caught:
        BrowserRules().check({"host": host})
    assert caught.value.status == 421


def test_every_host_if_asked_for() -> None:
    BrowserRules(hosts=["*"]).check({"host": "evil.example"})


@pytest.mark.parametrize(
    ("origin", "accepted"),
    [
        ("http://localhost:8000", True),
        ("https://localhost:8000", True),
        (APP, True),
        ("https://APP.example", True),
        ("http://app.example", False),
        ("http://localhost", False),
        ("http://localhost:9000", False),
        ("https://evil.example", False),
        ("https://app.example.evil.example", False),
        ("null", False),
        ("", False),
        ("file://localhost:8000", False),
        ("http://[", False),
    ],
)
def test_origins(origin: str, accepted: bool) -> None:
    rules, headers = BrowserRules(origins=[APP]), {"host": "localhost:8000", "origin": origin}
    if accepted:
        rules.check(headers)
        return
    with pytest.raises(HttpError) as caught:
        rules.check(headers)
    assert caught.value.status == 403


async def post(there: Door, **headers: str) -> int:
    return (await there.generate(headers=headers)).status_code


async def test_a_foreign_page_reaches_nothing() -> None:
    async with door(fake={"auto": True}) as there:
        assert await post(there) == 200
        assert await post(there, origin=there.url) == 200
        jobs = there.wire.server.dispatcher.counts.accepted
        assert await post(there, origin="https://evil.example") == 403
        assert await post(there, host="evil.example") == 421
        preflight = await there.client.options(
            "/v1/images/generations", headers={"origin": "https://evil.example"}
        )
        assert preflight.status_code == 403
        assert "access-control-allow-origin" not in preflight.headers
        assert (await there.client.get("/v1/models", headers={"host": "evil.example"})).is_error
        assert there.wire.server.dispatcher.counts.accepted == jobs


async def test_a_listed_origin_may_call() -> None:
    async with door(fake={"auto": True}, http={"http_origins": (APP,)}) as there:
        preflight = await there.client.options(
            "/v1/images/generations",
            headers={"origin": APP, "access-control-request-method": "POST"},
        )
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == APP
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        reply = await there.generate(headers={"origin": APP})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == APP
        error = await there.generate(model="nonsense", headers={"origin": APP})
        assert error.headers["access-control-allow-origin"] == APP
        plain = await there.generate()
        assert "access-control-allow-origin" not in plain.headers
        assert (await there.client.options("/v1/models")).status_code == 400
