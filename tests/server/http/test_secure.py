"""TLS and mutual TLS over HTTP, with certificates that change while the server runs."""

import asyncio
import os
import ssl
from pathlib import Path

import httpx2
import pytest

from darkroom_server.core.errors import StartupError
from darkroom_server.settings import Security
from tests.server.http.door import Door, door
from tests.server.security.certificates import Authority


async def serial_of(there: Door, context: ssl.SSLContext) -> int:
    """The serial number of the certificate that a new connection sees."""
    host, _, port = there.wire.server.http_address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    found = writer.get_extra_info("peercert")["serialNumber"]
    writer.close()
    return int(found, 16)


async def status(there: Door, context: ssl.SSLContext) -> int:
    url = f"https://{there.wire.server.http_address}"
    async with httpx2.AsyncClient(base_url=url, verify=context) as client:
        return (await client.post("/v1/images/generations", json={"prompt": "a"})).status_code


async def test_tls_with_a_certificate_that_changes(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = ssl.create_default_context(cafile=str(authority.file))
    security, channel = authority.security(), authority.channel()
    async with door(fake={"auto": True}, security=security, channel=channel) as there:
        assert await status(there, context) == 200
        with pytest.raises(httpx2.HTTPError):
            await there.client.get("/health")  # Plaintext.
        before = await serial_of(there, context)
        cert, _ = authority.issue()
        os.utime(cert, (1, 1))  # A change within the resolution of the clock.
        after = await serial_of(there, context)
        assert after != before
        cert.write_text("nonsense")
        assert await serial_of(there, context) == after
        assert await status(there, context) == 200


async def test_mutual_tls(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    authority, clients = Authority(tmp_path), Authority(tmp_path / "clients")
    shown = clients.issue("someone", to="client")
    security = authority.security(client_ca=clients)
    channel = authority.channel(shown)
    async with door(fake={"auto": True}, security=security, channel=channel) as there:
        context = ssl.create_default_context(cafile=str(authority.file))
        with pytest.raises(httpx2.HTTPError):
            await status(there, context)
        context.load_cert_chain(*shown)
        assert await status(there, context) == 200
        (tmp_path / "others").mkdir()
        stranger = Authority(tmp_path / "others").issue("someone", to="client")
        other = ssl.create_default_context(cafile=str(authority.file))
        other.load_cert_chain(*stranger)
        with pytest.raises(httpx2.HTTPError):
            await status(there, other)


async def test_a_network_address_needs_tls() -> None:
    with pytest.raises(StartupError, match=r"--http-host 0\.0\.0\.0 accepts calls"):
        async with door(http={"http_host": "0.0.0.0"}):
            pass
    async with door(http={"http_host": "0.0.0.0"}, security=Security(insecure=True)) as there:
        port = there.wire.server.http_address.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            async with httpx2.AsyncClient(base_url=f"http://{host}:{port}") as client:
                assert (await client.get("/health")).status_code == 200


async def test_a_port_that_is_taken() -> None:
    async with door() as there:
        port = int(there.wire.server.http_address.rpartition(":")[2])
        with pytest.raises(StartupError, match="--http-port"):
            async with door(http={"http_port": port}):
                pass


@pytest.mark.parametrize(("content", "wrong"), [(b"short", "32 bytes"), (None, "cannot be read")])
async def test_a_key_that_cannot_be_used(tmp_path: Path, content: bytes | None, wrong: str) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content)
    with pytest.raises(StartupError, match=wrong):
        async with door(http={"http_url_key": str(key)}):
            pass
