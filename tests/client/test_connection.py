"""The settings of a client, and its gRPC options."""

import json
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from darkroom.v1 import model_pb2, model_pb2_grpc
from darkroom_client import TLS, AsyncClient, Client, Keepalive, Retry
from darkroom_client._settings import Settings
from darkroom_client._transport.channels import (
    channel_options,
    dial_target,
    is_loopback,
    open_direct_channel,
)
from tests.client.conftest import Connect
from tests.client.scripted import ScriptedServer

DEFAULTS: dict[str, Any] = {
    "target": None,
    "tls": None,
    "token": None,
    "insecure": False,
    "timeout": 120.0,
    "keepalive": Keepalive(),
    "retry": Retry(),
    "max_reply_bytes": 64 * 2**20,
}


def settings(**changes: Any) -> Settings:
    return Settings.resolve(**{**DEFAULTS, **changes})


def test_the_options_of_the_plain_channel() -> None:
    options = dict(channel_options(settings(), checked=False))

    assert options["grpc.keepalive_time_ms"] == 60_000
    assert options["grpc.keepalive_timeout_ms"] == 20_000
    assert options["grpc.max_receive_message_length"] == 64 * 2**20
    config = json.loads(str(options["grpc.service_config"]))
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert "healthCheckConfig" not in config


def test_the_checked_channel_uses_health_checks() -> None:
    options = dict(channel_options(settings(), checked=True))
    plain = dict(channel_options(settings(), checked=False))

    config = json.loads(str(options.pop("grpc.service_config")))
    assert config == {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "darkroom.v1.GenerationService"},
    }
    # Otherwise each channel would open its own connection.
    del plain["grpc.service_config"]
    assert options == plain


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_only_finite_numbers(number: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Retry(max_backoff=number)
    with pytest.raises(ValueError, match="finite"):
        Retry(multiplier=number)
    with pytest.raises(ValueError, match="finite"):
        Keepalive(interval=number)


@pytest.mark.parametrize(
    ("target", "dialled"),
    [
        ("127.0.0.1:50051", "dns:///127.0.0.1:50051"),
        ("darkroom.example:443", "dns:///darkroom.example:443"),
        ("[::1]:50051", "dns:///[::1]:50051"),
        ("dns:///darkroom.example:443", "dns:///darkroom.example:443"),
        ("dns:50051", "dns:///dns:50051"),
        ("unix:/run/darkroom.sock", "unix:/run/darkroom.sock"),
        ("ipv4:127.0.0.1:50051,127.0.0.2:50051", "ipv4:127.0.0.1:50051,127.0.0.2:50051"),
    ],
)
def test_targets(target: str, dialled: str) -> None:
    assert dial_target(settings(target=target).target) == dialled


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.1.2.3:50051", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("dns:///localhost:50051", True),
        ("dns:localhost:50051", True),
        ("ipv4:127.0.0.1:50051,127.0.0.2:50051", True),
        ("ipv6:[::1]:50051", True),
        ("ipv4:127.0.0.1:50051,10.0.0.1:50051", False),
        ("10.0.0.1:50051", False),
        ("localhost.example:50051", False),
        ("[2001:db8::1]:50051", False),
        ("xds:///darkroom", False),
    ],
)
def test_loopback_targets(target: str, local: bool) -> None:
    assert is_loopback(target) is local
    assert (
        "grpc.enable_http_proxy" in dict(channel_options(settings(target=target), checked=True))
    ) is local


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_used_for_loopback(
    connect: Connect, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    port = server.address.rpartition(":")[2]

    assert connect(f"{host}:{port}", retry=Retry(attempts=1)).generate("a star").images


@pytest.mark.parametrize("target", ["http://127.0.0.1:50051", "darkroom.example", "::1"])
def test_invalid_targets(target: str) -> None:
    with pytest.raises(ValueError, match=r"host:port|names no port"):
        settings(target=target)


def test_the_environment_fills_unset_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().target == "127.0.0.1:50051"
    monkeypatch.setenv("DARKROOM_TARGET", "darkroom.example:443")
    monkeypatch.setenv("DARKROOM_TOKEN", "secret")
    monkeypatch.setenv("DARKROOM_CA", "ca.pem")

    filled = settings()
    assert (filled.target, filled.token, filled.tls) == (
        "darkroom.example:443",
        "secret",
        TLS(ca="ca.pem"),
    )
    assert settings(target="other:1").target == "other:1"
    assert settings(insecure=True).tls is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token": "secret"}, "a token would be sent unencrypted"),
        ({"insecure": True, "tls": TLS()}, "insecure=True means no TLS"),
        ({"token": "two\nlines", "insecure": True}, "printable"),
        ({"timeout": 0}, "above 0"),
        ({"timeout": float("nan")}, "above 0"),
        ({"timeout": float("inf")}, "above 0 and at most"),
        ({"timeout": 1e10}, "above 0 and at most"),
        ({"max_reply_bytes": 0}, "at least 1"),
    ],
)
def test_contradictory_settings_are_errors(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_repr_hides_the_token() -> None:
    assert "secret" not in repr(settings(token="secret", insecure=True))


def test_every_call_sends_the_token(connect: Connect, server: ScriptedServer) -> None:
    client = connect(server.address, token="secret", insecure=True)

    client.generate("a star")
    client.models()
    client.model("demo")

    assert [seen["authorization"] for seen in server.metadata] == ["Bearer secret"] * 3


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"a key": "1"}, "a key is made of"),
        ({"data-bin": "1"}, "no '-bin'"),
        ({"Grpc-Timeout": "1"}, "belongs to the client"),
        ({"darkroom-max-reply-bytes": "1"}, "belongs to the client"),
        ({"x": "ä"}, "printable ASCII"),
        ({"Authorization": "Bearer secret"}, "a token would be sent unencrypted"),
    ],
)
def test_invalid_metadata(client: Any, metadata: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        client.generate("a star", metadata=metadata)


@pytest.mark.parametrize("metadata", [{"x": 1}, {1: "x"}, {"x": b"1"}, {"x": None}])
def test_metadata_must_be_text(
    client: Any, server: ScriptedServer, metadata: dict[Any, Any]
) -> None:
    with pytest.raises(TypeError, match="must be a str"):
        client.generate("a star", metadata=metadata)

    assert not server.requests


def test_a_call_can_send_its_own_token_over_a_private_network(
    connect: Connect, server: ScriptedServer
) -> None:
    client = connect(server.address, insecure=True)

    client.generate("a star", metadata={"Authorization": "Bearer secret"})

    assert server.metadata[0]["authorization"] == "Bearer secret"


def test_a_call_cannot_replace_the_token_of_the_client(
    connect: Connect, server: ScriptedServer
) -> None:
    client = connect(server.address, token="secret", insecure=True)

    with pytest.raises(ValueError, match="belongs to the client"):
        client.generate("a star", metadata={"authorization": "Bearer other"})


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        (Retry, {"attempts": 0}, "at least 1"),
        (Retry, {"initial_backoff": 0.001}, "initial_backoff"),
        (Retry, {"initial_backoff": 2, "max_backoff": 1}, "initial_backoff"),
        (Keepalive, {"interval": 0}, "above 0"),
        (TLS, {"cert": "client.pem"}, "go together"),
    ],
)
def test_invalid_connection_settings(part: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        part(**fields)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for the name ``darkroom.test``, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"))


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate that is its own authority, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj"]
    command += ["/CN=darkroom.test", "-addext", "subjectAltName=DNS:darkroom.test"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def test_tls_with_a_token_and_both_certificates(
    connect: Connect, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), cert.read_bytes())], cert.read_bytes(), require_client_auth=True
    )
    with ScriptedServer(credentials=credentials) as server:
        tls = TLS(ca=cert, cert=cert, key=key, server_name="darkroom.test")
        client = connect(server.address, token="secret", tls=tls)

        assert client.generate("a star").images
        assert client.models()
        assert [seen["authorization"] for seen in server.metadata] == ["Bearer secret"] * 2


def test_a_channel_to_one_address_still_checks_the_name_of_the_target(
    certificate: tuple[Path, Path],
) -> None:
    cert, key = certificate
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    with ScriptedServer(credentials=credentials) as server:
        port = server.address.rpartition(":")[2]

        def list_models(name: str) -> grpc.StatusCode:
            names = settings(target=f"{name}:{port}", tls=TLS(ca=cert))
            with open_direct_channel(names, f"ipv4:127.0.0.1:{port}") as channel:
                stub: Any = model_pb2_grpc.ModelServiceStub(channel)
                call = stub.ListModels.future(model_pb2.ListModelsRequest(), timeout=30)
                code: grpc.StatusCode = call.code()
                return code

        # The certificate is for this name, not for the address.
        assert list_models("darkroom.test") is grpc.StatusCode.OK
        assert list_models("other.test") is grpc.StatusCode.UNAVAILABLE


def test_model_calls_can_send_metadata(client: Any, server: ScriptedServer) -> None:
    client.models(metadata={"X-Trace": "abc"})
    client.model(metadata={"X-Trace": "abc"})

    assert [seen["x-trace"] for seen in server.metadata] == ["abc"] * 2


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_missing_certificate_file_is_an_error(
    kind: type[Client] | type[AsyncClient], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        kind("127.0.0.1:1", tls=TLS(ca=tmp_path / "none.pem"))
