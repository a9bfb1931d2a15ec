"""TLS, tokens and ``--insecure`` in real processes: one clear line per error."""

import json
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from darkroom.v1 import model_pb2, model_pb2_grpc
from tests.server.app.process import start
from tests.server.app.test_cli import complaint, run
from tests.server.security.certificates import Authority

TOKEN = "a-token-that-is-nowhere-to-be-seen"


def minted(name: str) -> tuple[str, str]:
    """Return a new token and its lines for the file."""
    lines = run("token", name).stdout.splitlines()
    return lines[2], "\n".join(lines[lines.index("[[token]]") :])


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_network_address_needs_tls(host: str) -> None:
    line = complaint(run("serve", "--host", host))
    assert line.startswith(f"--host {host} accepts calls from other machines")
    assert "--tls-cert" in line
    assert "--insecure" in line


def test_an_unknown_host_name() -> None:
    assert "no such address" in complaint(run("serve", "--host", "nowhere.invalid"))


def test_insecure_listens_and_logs_a_warning() -> None:
    with start("--host", "0.0.0.0", "--insecure") as server:
        warning = server.until("insecure")
        assert warning["level"] == "warning"
        assert warning["host"] == "0.0.0.0"
        assert server.until("serving")["address"].startswith("0.0.0.0:")


def test_loopback_needs_no_tls() -> None:
    with start("--host", "localhost") as server:
        assert server.until("serving")


def test_unusable_files(tmp_path: Path) -> None:
    cert, key = map(str, Authority(tmp_path).issue())
    assert "--tls-cert /x: cannot be read" in complaint(
        run("serve", "--tls-cert", "/x", "--tls-key", key)
    )
    assert "go together" in complaint(run("serve", "--tls-cert", cert))
    assert "--tokens /x: cannot be read" in complaint(run("serve", "--tokens", "/x"))


def health(target: str, *arguments: str, env: dict[str, str] | None = None) -> "tuple[int, str]":
    result: subprocess.CompletedProcess[str] = run("healthcheck", *arguments, env=env)
    assert len(result.stdout.splitlines()) == 1, result.stderr
    return result.returncode, result.stdout.strip().removeprefix(f"{target}: ")


@pytest.mark.parametrize("mutual", [False, True])
def test_healthcheck_over_tls(tmp_path: Path, mutual: bool) -> None:
    authority = Authority(tmp_path)
    cert, key = map(str, authority.issue("*.darkroom.example", "darkroom.example"))
    flags = ["--tls-cert", cert, "--tls-key", key]
    env = {"DARKROOM_SERVE_TLS_CERT": cert, "DARKROOM_SERVE_TLS_KEY": key}
    if mutual:
        flags += ["--tls-client-ca", str(authority.file)]
        env["DARKROOM_SERVE_TLS_CLIENT_CA"] = str(authority.file)
    with start("--host", "0.0.0.0", *flags) as server:
        port = server.until("serving")["address"].rpartition(":")[2]
        target = f"127.0.0.1:{port}"
        # In the server's container, all settings come from the environment.
        env |= {"DARKROOM_SERVE_PORT": port, "DARKROOM_SERVE_HOST": "0.0.0.0"}
        assert health(target, env=env) == (0, "SERVING")
        there = ["--target", target, "--ca", str(authority.file)]
        shown = ["--cert", cert, "--key", key] if mutual else []
        name = ["--server-name", "darkroom.example"]
        assert health(target, *there, *shown, *name) == (0, "SERVING")
        code, line = health(target, *there, *shown)  # The address is not in the certificate.
        assert code == 1
        assert line.startswith("UNAVAILABLE")
        assert health(target, "--target", target)[0] == 1


def test_failed_handshakes_do_not_fill_the_log(tmp_path: Path) -> None:
    cert, key = map(str, Authority(tmp_path).issue())
    with start("--tls-cert", cert, "--tls-key", key) as server:
        host, _, port = server.until("serving")["address"].rpartition(":")
        for _ in range(3):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert stranger.recv(1024) is not None  # The server closed the connection.
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        assert [json.loads(line)["event"] for line in server.rest()] == [
            "signal",
            "draining",
            "stopped",
        ]


def test_healthcheck_with_incomplete_flags() -> None:
    line = complaint(run("healthcheck", "--target", "127.0.0.1:1", "--cert", "x"))
    assert line == "healthcheck: --cert, --key and --server-name need --ca"
    line = complaint(run("healthcheck", "--target", "127.0.0.1:1", "--ca", "/x"))
    assert line == "--ca /x: cannot be read: No such file or directory"


def test_an_invalid_token_name() -> None:
    assert "1 to 64" in complaint(run("token", "no good"))


def metrics(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def test_secrets_appear_in_no_output(tmp_path: Path) -> None:
    token, lines = minted("web")
    file = tmp_path / "tokens.toml"
    file.write_text(lines)
    hub = "hf_a-token-for-the-hub"
    flags = ["--tokens", str(file), "--log-level", "debug"]
    with start(*flags, env={"HF_TOKEN": hub}) as server:
        loading, serving = server.until("loading"), server.until("serving")
        said = [str(loading), str(serving)]
        with grpc.insecure_channel(serving["address"]) as channel:
            models = model_pb2_grpc.ModelServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel)
            for sent in (token, TOKEN):
                try:
                    models.ListModels(
                        model_pb2.ListModelsRequest(),
                        metadata=(("authorization", f"Bearer {sent}"),),
                    )
                except grpc.RpcError as error:
                    said += [str(error), str(error.trailing_metadata())]
            # From now on the file is invalid: the token was pasted in the wrong place.
            file.write_text(f'[[token]]\nname = "web"\nsha256 = "{token}"\n')
            models.ListModels(
                model_pb2.ListModelsRequest(), metadata=(("authorization", f"Bearer {token}"),)
            )
            said.append(str(server.until("reread failed, keeping the old ones")))
            assert health.Check(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
        said.append(metrics(loading["metrics"]))
        said += [run("serve", *flags, "--help").stdout, run("token", "--help").stdout]
    assert "UNAUTHENTICATED" in str(said)
    assert "grpc_server_handled_total" in str(said)
    for secret in (token, TOKEN, hub):
        assert secret not in str(said)
