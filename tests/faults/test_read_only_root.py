"""A server on a file system that cannot be written, as in a container with a read-only root."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from darkroom_client import Client
from tests.engine.tiny import write_tiny_model
from tests.server.app.process import CLEAN, ServerProcess

PRIVILEGES = () if os.geteuid() == 0 else ("--user", "--map-root-user")
ONLY_WRITABLE = 'mount --bind "$1" "$1" && mount -o remount,bind,ro / && shift && exec "$@"'
"""Makes the root file system read-only, except for the folder of the first argument."""

# torch sets the last one when it is imported, as here.
FOLDERS = ("TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
ENVIRONMENT = {name: value for name, value in CLEAN.items() if name not in FOLDERS}


def read_only(writable: Path) -> list[str]:
    """The prefix of a command that can write only in ``writable``; skips if there is none here."""
    prefix = ["unshare", *PRIVILEGES, "--mount", "sh", "-c", ONLY_WRITABLE, "sh", str(writable)]
    writable.mkdir(exist_ok=True)
    inside = [*prefix, "touch", str(writable / "probe")]
    tried = subprocess.run(inside, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no mount namespace can be made here: {tried.stderr.strip()}")
    outside = [*prefix, "touch", str(writable.parent / "probe")]
    assert subprocess.run(outside, capture_output=True, check=False).returncode
    return prefix


@contextmanager
def served(prefix: list[str], model: str, *flags: str) -> Iterator[ServerProcess]:
    serve = [sys.executable, "-m", "darkroom_server", "serve", "--model", model, "--rows", "2"]
    ports = ["--port", "0", "--metrics-port", "0", "--log-format", "json"]
    command = [*prefix, *serve, *ports, "--measurement-cache", *flags]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield ServerProcess(process)
        finally:
            process.kill()


def test_it_works_if_the_state_folder_can_be_written(tmp_path: Path) -> None:
    state = tmp_path / "state"
    prefix, model = read_only(state), f"tiny={write_tiny_model(tmp_path)}"
    with served(prefix, model, "--state-dir", str(state)) as server:
        with Client(server.until("serving")["address"], insecure=True) as client:
            assert client.generate("a red circle", steps=1).images
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        warnings = [line for line in server.rest() if '"level": "warning"' in line]
    assert not [line for line in warnings if "not remembered" in line]
    remembered = sorted(path.name for path in (state / "measurements").iterdir())
    assert len(remembered) == 2
    assert "load-times.json" in remembered


def test_it_does_not_work_without_one(tmp_path: Path) -> None:
    """The control: torch finds no folder for temporary files."""
    prefix, model = read_only(tmp_path / "state"), f"tiny={write_tiny_model(tmp_path)}"
    with served(prefix, model, "--engine-max-restarts", "0") as server:
        assert "No usable temporary directory" in server.until("engine died")["exception"]
        assert server.wait() != 0
