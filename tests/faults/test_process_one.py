"""The server as process 1 of a namespace, as in a container."""

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
from tests.server.app.process import MAIN, ServerProcess

PRIVILEGES = () if os.geteuid() == 0 else ("--user", "--map-root-user")
NAMESPACE = ("unshare", *PRIVILEGES, "--pid", "--fork", "--mount-proc", "--kill-child")


class ProcessOne(ServerProcess):
    """A server that is process 1 of a namespace; ``unshare`` is its parent."""

    def send(self, number: signal.Signals) -> None:
        """Send a signal from outside the namespace, as a container runtime does."""
        (server,) = psutil.Process(self._process.pid).children()
        server.send_signal(number)


@contextmanager
def served(*program: str) -> Iterator[ProcessOne]:
    """A server as process 1; ``program``: the arguments of Python that start it."""
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no process namespace can be made here: {tried.stderr.strip()}")
    command = [*NAMESPACE, sys.executable, *program, "--log-format", "json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as outer:
        try:
            yield ProcessOne(outer)
        finally:
            outer.kill()


def test_it_generates_an_image_and_exits_on_sigterm(tmp_path: Path) -> None:
    model = f"tiny={write_tiny_model(tmp_path)}"
    serve = ["serve", "--model", model, "--port", "0", "--metrics-port", "0"]
    with served("-m", "darkroom_server", *serve, "--threads", "1", "--rows", "2") as server:
        with Client(server.until("serving")["address"], insecure=True) as client:
            client.wait_until_ready(120)
            assert client.generate("a red circle", steps=1).images
        server.send(signal.SIGTERM)
        assert server.wait() == 0


def test_a_second_signal_forces_the_exit() -> None:
    with served("-c", MAIN, "{}", "--drain-delay", "600") as server:
        server.until("serving")
        server.send(signal.SIGTERM)
        server.until("draining")
        server.send(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
