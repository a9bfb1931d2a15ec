"""The server is process 1 of a namespace, as it is in a container."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from darkroom_client import Client
from tests.engine.tiny import write_tiny_model

PRIVILEGES = () if os.geteuid() == 0 else ("--user", "--map-root-user")
NAMESPACE = ("unshare", *PRIVILEGES, "--pid", "--fork", "--mount-proc", "--kill-child")


class ProcessOne:
    """A server that is process 1 of a namespace; ``outer`` is the process that made that."""

    def __init__(self, outer: "subprocess.Popen[str]") -> None:
        self._outer = outer
        self.address: str = self.until("serving")["address"]

    def until(self, event: str) -> dict[str, str]:
        """Wait for a line of the log."""
        assert self._outer.stderr
        lines = []
        for line in self._outer.stderr:
            lines.append(line)
            entry: dict[str, str] = json.loads(line) if line.startswith("{") else {}
            if entry.get("event") == event:
                return entry
        pytest.fail(f"the server ended without {event!r}:\n{''.join(lines)}")

    def signal(self, number: signal.Signals) -> None:
        """From outside, as a container's runtime sends it."""
        (server,) = psutil.Process(self._outer.pid).children()
        server.send_signal(number)

    def exit_code(self) -> int:
        """Once it has ended."""
        return self._outer.wait(60)


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[ProcessOne]:
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no process namespace can be made here: {tried.stderr.strip()}")
    model = f"tiny={write_tiny_model(folder)}"
    serve = [sys.executable, "-m", "darkroom_server", "serve", "--model", model, "--port", "0"]
    command = [*NAMESPACE, *serve, "--metrics-port", "0", "--log-format", "json", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as outer:
        try:
            yield ProcessOne(outer)
        finally:
            outer.kill()


def test_it_draws_and_ends_when_told(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        with Client(server.address, insecure=True) as client:
            client.wait_until_ready(120)
            assert client.generate("a red circle", steps=1).images
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_a_second_signal_forces_it(tmp_path: Path) -> None:
    with served(tmp_path, "--drain-delay", "600") as server:
        server.signal(signal.SIGTERM)
        server.until("draining")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 128 + signal.SIGTERM
