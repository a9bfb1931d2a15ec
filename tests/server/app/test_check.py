"""``serve --check`` and ``serve --print-config`` in real processes."""

import json
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.server.app.process import CLEAN, MAIN

FREE = ("--port", "0", "--metrics-port", "0")


def check(
    *flags: str, env: dict[str, str] | None = None, **engine: object
) -> "subprocess.CompletedProcess[str]":
    """Run ``serve --check`` with the fake engine; ports of ``flags`` win over free ones."""
    return subprocess.run(
        [sys.executable, "-c", MAIN, json.dumps(engine), "--check", *flags],
        env=CLEAN | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_server_that_can_start_is_checked_with_exit_code_0(tmp_path: Path) -> None:
    result = check(env={"XDG_CACHE_HOME": str(tmp_path / "new")})
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    names = [line.split()[1] for line in lines]
    assert names == ["settings:", "port:", "metrics", "state", "engine"]
    assert "loaded demo on cpu" in lines[-1]


def test_every_problem_is_reported_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = check(
            "--port",
            port,
            "--tls-cert",
            "only.pem",
            env={"XDG_CACHE_HOME": str(tmp_path / "file")},
            startup_error="no such folder",
        )
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["problem", "problem", "ok", "problem", "problem"]
    texts = [
        "--tls-cert and --tls-key go together",
        "Address already in use",
        "metrics port",
        "Not a directory",
        "no such folder",
    ]
    assert all(text in line for text, line in zip(texts, lines, strict=True))


def test_the_state_folder_is_checked_even_if_nothing_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = ("--no-measurement-cache", "--state-dir")
    found = check(*FREE, *flags, str(tmp_path / "new"))
    assert f"state folder: {tmp_path / 'new'} can be written" in found.stdout
    missing = check(*FREE, *flags, str(tmp_path / "file" / "below"))
    assert missing.returncode == 1
    assert "cannot be written: Not a directory" in missing.stdout
    assert "state folder cannot be written" in missing.stderr


def test_a_model_that_does_not_exist_is_a_problem() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "darkroom_server", "serve", "--check", *FREE, "--model", "a=/no/m"],
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "no such file or folder" in result.stdout


def print_config(*flags: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "darkroom_server", "serve", "--print-config", *flags],
        env=CLEAN | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_printed_settings_are_a_file_that_gives_the_same(tmp_path: Path) -> None:
    flags = ("--port", "1234", "--model", "demo", "--model", 'b="x"=demo', "--dtype", "float32")
    printed = print_config(*flags, DARKROOM_SERVE_GRACE="2.5")
    tables = tomllib.loads(printed)
    assert tables["network"]["port"] == 1234
    assert tables["models"]["model"] == ["demo", 'b="x"=demo']
    assert tables["shutdown"]["grace"] == 2.5
    assert "port = 1234  # --port" in printed
    assert "grace = 2.5  # DARKROOM_SERVE_GRACE" in printed
    assert "# rows: measured" in printed
    file = tmp_path / "again.toml"
    file.write_text(printed)
    assert tomllib.loads(print_config("--config", str(file))) == tables


def test_the_printed_settings_hold_no_secret() -> None:
    url = "https://ann:hunter2@hub.example/m"
    printed = print_config("--server-id", url, HF_TOKEN="hf_secret")
    assert "hf_secret" not in printed
    assert "hunter2" not in printed
    assert "HF_TOKEN = <redacted>" in printed
    assert "https://<redacted>@hub.example/m" in printed


def test_check_and_print_config_exclude_each_other() -> None:
    result = check("--print-config")
    assert result.returncode == 2
    assert "not allowed with" in result.stderr
