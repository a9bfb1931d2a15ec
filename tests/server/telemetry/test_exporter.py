import asyncio
import errno
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry

from darkroom_server.telemetry import Exporter
from darkroom_server.telemetry import exporter as exporter_module
from tests.server.telemetry.scrape import OPENMETRICS, scrape
from tests.server.wire import serving


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_healthz_says_whether_jobs_are_accepted() -> None:
    async with serving(fake={"load": False}, wait=False) as wire:
        address = wire.server.metrics_address
        assert await asyncio.to_thread(get, address, "/healthz") == (503, "not ready\n")
        wire.engine.become_ready()
        await wire.health_becomes(1)
        assert await asyncio.to_thread(get, address, "/healthz") == (200, "ready\n")
        status, text = await asyncio.to_thread(get, address, "/")
        assert (status, text) == (404, "try /metrics or /healthz\n")


async def test_a_scraper_may_ask_for_openmetrics() -> None:
    async with serving(fake={"auto": True}) as wire:
        await wire.generate()
        assert (await scrape(wire, OPENMETRICS)).endswith("# EOF\n")
        assert not (await scrape(wire)).endswith("# EOF\n")


def test_stalled_connections_do_not_block_others() -> None:
    exporter = Exporter(CollectorRegistry(), lambda: True)
    address = exporter.start("127.0.0.1", 0)
    host, port = address.split(":")
    try:
        with ExitStack() as stalled:
            for index in range(32):
                client = stalled.enter_context(socket.create_connection((host, int(port))))
                if index % 2:  # Sends a request and never reads the answer.
                    client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                elif index % 4:  # Never completes its request.
                    client.sendall(b"GET /metr")
            assert get(address, "/metrics")[0] == 200
            assert get(address, "/healthz") == (200, "ready\n")
    finally:
        exporter.stop()


def test_a_connection_that_never_completes_its_request_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporter_module, "CONNECTION_SECONDS", 0.2)
    exporter = Exporter(CollectorRegistry(), lambda: True)
    host, port = exporter.start("127.0.0.1", 0).split(":")
    try:
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(b"GET /metr")
            assert client.recv(1) == b""
    finally:
        exporter.stop()


def test_slow_clients_take_a_bounded_number_of_threads() -> None:
    before = threading.active_count()
    exporter = Exporter(CollectorRegistry(), lambda: True)
    address = exporter.start("127.0.0.1", 0)
    host, port = address.split(":")
    try:
        with ExitStack() as slow:
            for _ in range(200):
                client = slow.enter_context(socket.create_connection((host, int(port))))
                client.sendall(b"GET /metr")
                most = threading.active_count() - before
                assert most <= 40
            assert most >= 16  # They did take threads.
            began = time.monotonic()
            assert get(address, "/healthz") == (200, "ready\n")
            assert time.monotonic() - began < 2.0
    finally:
        exporter.stop()


def test_the_port_is_free_again() -> None:
    exporter = Exporter(CollectorRegistry(), lambda: True)
    address = exporter.start("127.0.0.1", 0)
    exporter.stop()
    again = Exporter(CollectorRegistry(), lambda: True)
    assert again.start("127.0.0.1", int(address.split(":")[1])) == address
    again.stop()


def has_ipv6() -> bool:
    """Whether this machine can connect to its own IPv6 address."""
    with socket.socket(socket.AF_INET6) as probe:
        return probe.connect_ex(("::1", 9)) == errno.ECONNREFUSED


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_wildcard_address_serves_ipv4_and_ipv6(host: str) -> None:
    exporter = Exporter(CollectorRegistry(), lambda: True)
    address = exporter.start(host, 0)
    port = address.rpartition(":")[2]
    try:
        assert address.rpartition(":")[0].strip("[]") == host
        for mine in ("127.0.0.1", "[::1]"):
            assert get(f"{mine}:{port}", "/healthz") == (200, "ready\n")
    finally:
        exporter.stop()
