import asyncio
import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
import structlog

from darkroom.v1 import model_pb2, model_pb2_grpc
from darkroom_server.core.errors import StartupError
from darkroom_server.security.tls import Files, read_pair
from darkroom_server.settings import Network, Security
from tests.server.security.certificates import Authority
from tests.server.wire import serving

AUTO = {"auto": True}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def list_models(channel: grpc.aio.Channel) -> int:
    async with channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        answer = await stub.ListModels(model_pb2.ListModelsRequest())
        return len(answer.models)


async def refused(channel: grpc.aio.Channel) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await list_models(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return caught.value.details() or ""


async def serial_of(address: str) -> bytes:
    """Return the certificate that the server presents to a new connection."""
    host, _, port = address.rpartition(":")
    text = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)), timeout=20)
    return text.encode()


async def test_calls_over_tls(authority: Authority) -> None:
    async with serving(
        fake=AUTO, security=authority.security(), channel=authority.channel()
    ) as wire:
        assert (await wire.generate()).images


async def test_plaintext_on_a_tls_port_affects_no_other_caller(authority: Authority) -> None:
    async with serving(
        fake=AUTO, security=authority.security(), channel=authority.channel()
    ) as wire:
        await refused(grpc.aio.insecure_channel(wire.server.address))
        assert (await wire.generate()).images


async def test_a_caller_that_trusts_another_ca_is_rejected(
    authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    async with serving(security=authority.security(), channel=authority.channel()) as wire:
        assert "CERTIFICATE_VERIFY_FAILED" in await refused(other.channel()(wire.server.address))


async def test_mutual_tls_requires_a_client_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "callers").mkdir()
    callers = Authority(tmp_path / "callers")
    shown = callers.issue("caller", to="caller")
    stranger = authority.issue("stranger", to="stranger")
    security = authority.security(client_ca=callers)
    async with serving(security=security, channel=authority.channel(shown)) as wire:
        assert await list_models(authority.channel(shown)(wire.server.address)) == 1
        await refused(authority.channel()(wire.server.address))
        await refused(authority.channel(stranger)(wire.server.address))


async def test_a_rotated_certificate_is_served_without_a_restart(authority: Authority) -> None:
    security = authority.security()
    async with serving(security=security, channel=authority.channel()) as wire:
        address = wire.server.address
        first = await serial_of(address)
        assert await serial_of(address) == first
        cert, _ = authority.issue()
        second = await serial_of(address)
        assert second != first
        assert cert.read_bytes().startswith(second.strip())
        # Open connections stay open.
        assert await list_models(wire.channel) == 1


async def test_a_broken_new_pair_is_logged_and_the_old_pair_stays(authority: Authority) -> None:
    security = authority.security()
    async with serving(security=security, channel=authority.channel()) as wire:
        address = wire.server.address
        first = await serial_of(address)
        assert security.tls_cert is not None
        with structlog.testing.capture_logs() as logs:
            Path(security.tls_cert).write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
            assert await serial_of(address) == first
            os.remove(security.tls_cert)
            assert await serial_of(address) == first
            assert await serial_of(address) == first
        errors = [line for line in logs if line["log_level"] == "error"]
        assert [line["what"] for line in errors] == ["certificates", "certificates"]
        assert "cannot be read: No such file" in errors[1]["why"]
        authority.issue()
        assert await serial_of(address) != first


@pytest.mark.parametrize("wrong", ["cert", "key", "client_ca"])
def test_a_missing_file_is_named(authority: Authority, wrong: str) -> None:
    cert, key = authority.issue()
    files = {"cert": str(cert), "key": str(key), "client_ca": str(authority.file)}
    flag = "--tls-" + wrong.replace("_", "-")
    with pytest.raises(StartupError, match=f"^{flag} /nowhere: cannot be read: No such file"):
        read_pair(Files(**{**files, wrong: "/nowhere"}))


def test_an_invalid_pair_is_reported(authority: Authority, tmp_path: Path) -> None:
    cert, key = map(str, authority.issue())
    _, other = map(str, authority.issue(to="other"))
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")

    def complaint(**files: str) -> str:
        with pytest.raises(StartupError) as caught:
            read_pair(Files(**{"cert": cert, "key": key, **files}))
        return str(caught.value)

    assert complaint(key=other) == f"--tls-key {other}: belongs to another certificate"
    assert "holds no private key in PEM" in complaint(key=str(nonsense))
    assert "holds no certificate in PEM" in complaint(cert=str(nonsense))
    assert "--tls-client-ca" in complaint(client_ca=str(nonsense))
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    expired, its_key = map(str, authority.issue(to="expired", not_after=long_ago))
    assert "certificate has expired" in complaint(cert=expired, key=its_key)


async def test_incomplete_tls_settings_are_rejected(authority: Authority) -> None:
    cert, _ = authority.issue()
    for security in (Security(tls_cert=str(cert)), Security(tls_client_ca=str(cert))):
        with pytest.raises(StartupError, match="--tls-"):
            async with serving(security=security, network=Network(port=0, metrics_port=0)):
                pass
