"""Models, status, probes, the page's files, unknown paths, metrics and the OpenAPI document."""

import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from darkroom_server.core.errors import DarkroomError, Refused
from darkroom_server.http import openapi
from darkroom_server.http.connection import Connection
from darkroom_server.http.errors import STATUSES
from darkroom_server.http.routes.table import routes_of
from darkroom_server.http.routing import Route, find_route
from darkroom_server.http.signed_urls import SignedUrls
from darkroom_server.settings import Security
from tests.server.http.door import bearer, door, token_file
from tests.server.telemetry.scrape import counted, values


def test_the_document_is_current() -> None:
    """Fix with `python -m darkroom_server.http.openapi >…/http/openapi.json`."""
    assert openapi.DOCUMENT.read_text() == openapi.text()


async def test_the_document_has_every_route() -> None:
    async with door() as there:
        reply = await there.client.get("/openapi.json")
        paths = reply.json()["paths"]
        routes = routes_of(Mock(), Mock(), SignedUrls(1.0), page=False)
        assert paths.keys() == {route.path for route in routes}
        for path, methods in paths.items():
            for method in methods:
                found = await there.client.request(method, path)
                assert found.status_code not in (405,), path
                assert found.json().get("error", {}).get("code") != "unknown_path", path


async def test_the_parts_of_an_answer_do_not_wait_for_acknowledgements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accepted: list[socket.socket] = []
    made = Connection.connection_made

    def note(connection: Connection, transport: Any) -> None:
        made(connection, transport)
        accepted.append(transport.get_extra_info("socket"))

    monkeypatch.setattr(Connection, "connection_made", note)
    async with door() as there:
        await there.client.get("/v1/models")
        (connection,) = accepted
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_models() -> None:
    async with door() as there:
        listed = (await there.client.get("/v1/models")).json()
        one = (await there.client.get("/v1/models/demo")).json()
        unknown = await there.client.get("/v1/models/org/name")
    assert listed == {"object": "list", "data": [one]}
    assert one["object"] == "model"
    assert one["ready"]
    assert one["defaults"]["steps"] == 4
    assert {"name": "ddim", "min_steps": 1, "max_steps": 1000} in one["schedulers"]
    assert unknown.status_code == 404
    assert "'org/name'" in unknown.json()["error"]["message"]


async def test_ready_follows_the_engine() -> None:
    async with door(fake={"load": False}, wait=False) as there:
        loading = await there.client.get("/ready")
        assert (loading.status_code, loading.json()) == (503, {"state": "loading"})
        assert (await there.client.get("/health")).status_code == 200
        assert not (await there.client.get("/v1/models/demo")).json()["ready"]
        there.wire.engine.become_ready()
        await there.wire.becomes(lambda: there.wire.server.dispatcher.ready)
        assert (await there.client.get("/ready")).status_code == 200


async def test_status_is_for_admins(tmp_path: Path) -> None:
    security = Security(tokens=token_file(tmp_path, "alice", admins=("ops",)))
    async with door(security=security) as there:
        task = there.generating(headers=bearer("alice"))
        await there.wire.submitted.get()
        there.wire.engine.advance()
        reply = await there.client.get("/v1/status", headers=bearer("ops"))
        assert reply.status_code == 200
        status = reply.json()
        assert status["running_jobs"] == 1
        assert status["engines"][0]["device"] == "cpu"
        there.wire.engine.advance(3)
        await task


async def test_paths_and_methods() -> None:
    async with door() as there:
        unknown = await there.client.get("/v1/nothing")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_path")
        wrong = await there.client.get("/v1/images/generations")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        head = await there.client.head("/health")
        assert (head.status_code, head.content) == (200, b"")
        assert (await there.client.get("/page/x")).status_code == 404


async def test_the_page_is_static_and_strict() -> None:
    async with door() as there:
        page = await there.client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for name in ("page.css", "page.js"):
            assert f"/page/{name}" in page.text
            assert (await there.client.get(f"/page/{name}")).status_code == 200
        assert "http://" not in page.text
        assert "https://" not in page.text
    async with door(http={"page": False}) as there:
        assert (await there.client.get("/")).status_code == 404


async def test_metrics_have_bounded_labels() -> None:
    async with door(fake={"auto": True}) as there:
        await there.generate()
        await there.client.get("/v1/secret-path")
        await there.client.get("/v1/models/secret-model")
        await there.client.request("SECRET", "/health")
        labels = ("method", "route", "status")
        found = await counted(there.wire, "darkroom_http_requests_total", *labels)
        in_flight = await values(there.wire, "darkroom_http_requests_in_flight")
    assert found == {
        ("POST", "/v1/images/generations", "200"): 1,
        ("GET", "unknown", "404"): 1,
        ("GET", "/v1/models/{model}", "404"): 1,
        ("other", "/health", "405"): 1,
    }
    assert in_flight == {(): 0}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/x", {"one": "x"}),
        ("/a/x/y", {"one": "x/y"}),
        ("/b/x/y", {"one": "x", "two": "y"}),
        ("/b/x", None),
        ("/a/", None),
        ("/axx", None),
    ],
)
def test_routing(path: str, expected: dict[str, str] | None) -> None:
    async def handler(call: Any) -> Any: ...

    routes = [Route("GET", "/a/{one}", handler), Route("GET", "/b/{one}/{two}", handler)]
    route, found = find_route(routes, path)
    assert (found if route else None) == expected


def test_every_error_has_a_status() -> None:
    pending, found = [DarkroomError], set()
    while pending:
        pending += (subclasses := pending.pop().__subclasses__())
        found |= {each for each in subclasses if each is not Refused}
    assert set(STATUSES) == found
