"""The command line in real processes: exit codes, and one clear line per error."""

import asyncio
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.app.process import CLEAN, start
from tests.server.wire import serving


def run(*arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "darkroom_server", *arguments],
        env=CLEAN | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def complaint(result: "subprocess.CompletedProcess[str]") -> str:
    """Return the one line that a command prints after wrong arguments or settings."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = (
        line for line in result.stderr.splitlines() if not line.startswith("{")
    )  # The log's lines are JSON here.
    assert line.startswith("darkroom-server: error: ")
    return line.removeprefix("darkroom-server: error: ")


def test_help_is_fast_and_lists_every_setting() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("serve", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert "--max-queued-jobs" in result.stdout
    # CPU time, so a busy machine does not matter: about 0.12 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("module", ["pydantic", "grpc", "structlog", "torch"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = (
        "import sys\nfrom darkroom_server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        f"except SystemExit: assert {module!r} not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_command_prints_help() -> None:
    result = run()
    assert result.returncode == 0
    assert "healthcheck" in result.stdout


def test_version() -> None:
    assert run("--version").stdout == "darkroom-server 0.1.0\n"


def test_an_unknown_flag() -> None:
    assert "unrecognized arguments: --prot" in complaint(run("serve", "--prot", "1"))


def test_a_bad_value() -> None:
    assert complaint(run("serve", "--port", "x")) == "--port: must be a valid integer, not 'x'"


def test_all_problems_of_a_file_are_one_line_each(tmp_path: Path) -> None:
    config = tmp_path / "d.toml"
    config.write_text("[network]\nprot = 1\nport = 'x'\n")
    result = run("serve", "--config", str(config))
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert "unknown key 'network.prot'" in first
    assert "network.port: must be a valid integer" in second


def test_a_bad_key_in_the_file(tmp_path: Path) -> None:
    config = tmp_path / "d.toml"
    config.write_text("[network]\nprot = 1\n")
    assert "unknown key 'network.prot'" in complaint(run("serve", "--config", str(config)))


def test_a_missing_model() -> None:
    assert "no such file or folder" in complaint(run("serve", "--model", "./nothing"))


@pytest.mark.parametrize("other", ["--port", "--metrics-port"])
def test_a_port_in_use(other: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        free = "--metrics-port" if other == "--port" else "--port"
        line = complaint(run("serve", other, port, free, "0"))
    assert f"127.0.0.1:{port}: Address already in use; choose another with {other}" in line


def test_an_engine_that_cannot_load() -> None:
    with start(startup_error="model folder '/x' is empty") as server:
        assert server.wait() == 2
        line = server.rest()[-1]
    assert line == "darkroom-server: error: model folder '/x' is empty"


def test_an_unknown_variable_is_a_warning() -> None:
    with start(env={"DARKROOM_SERVE_PROT": "1"}) as server:
        warning = server.until(
            "DARKROOM_SERVE_PROT is not a setting and is ignored; did you mean DARKROOM_SERVE_PORT?"
        )
        assert warning["level"] == "warning"


async def test_healthcheck_reports_readiness() -> None:
    async with serving(wait=False, fake={"load": False}) as wire:
        target = wire.server.address

        async def check(*arguments: str, **env: str) -> tuple[int, str]:
            result = await asyncio.to_thread(run, "healthcheck", *arguments, env=env)
            assert len(result.stdout.splitlines()) == 1, result.stderr
            return result.returncode, result.stdout.strip()

        assert await check("--target", target) == (1, f"{target}: NOT_SERVING")
        assert (await check("--target", target, "--service", "liveness"))[0] == 0
        wire.engine.become_ready()
        await wire.health_becomes(1)
        assert await check("--target", target) == (0, f"{target}: SERVING")
        # In the server's container, the address comes from the environment.
        port = target.rpartition(":")[2]
        env = {"DARKROOM_SERVE_PORT": port, "DARKROOM_SERVE_HOST": "0.0.0.0"}
        assert await check(**env) == (0, f"127.0.0.1:{port}: SERVING")


async def test_healthcheck_of_this_machine_uses_no_proxy() -> None:
    proxied = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    proxied["no_proxy"] = ""
    async with serving() as wire:
        port = wire.server.address.rpartition(":")[2]
        for arguments, env in (
            (("--target", f"127.0.0.1:{port}"), proxied),
            (("--target", f"localhost:{port}"), proxied),
            ((), {**proxied, "DARKROOM_SERVE_PORT": port, "DARKROOM_SERVE_HOST": "0.0.0.0"}),
        ):
            result = await asyncio.to_thread(run, "healthcheck", *arguments, env=env)
            assert result.returncode == 0, result.stdout


def test_healthcheck_of_a_closed_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        target = f"127.0.0.1:{taken.getsockname()[1]}"
    result = run("healthcheck", "--target", target, "--timeout", "2")
    assert result.returncode == 1
    assert result.stdout.startswith(f"{target}: UNAVAILABLE")
    assert os.linesep not in result.stdout.strip()
