"""A real server in its own process."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import pytest

from darkroom_client import Client

READY_SECONDS = 240


class LogReader:
    """Reads a server's log to its end, and finds the server's address in it.

    The pipe must be read: a server whose pipe is full blocks at its next line.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.lines: list[str] = []
        self.address = ""
        self.http = ""
        self.located = threading.Event()
        self._stream = stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            self.lines.append(line)
            if not self.address and line.startswith("{"):
                found = json.loads(line)
                self.address, self.http = found.get("address", ""), found.get("http", "")
                if self.address:
                    self.located.set()
        # The server has ended: wake the thread that waits for its address.
        self.located.set()

    def join(self) -> str:
        """The whole log, once the server has ended."""
        self._thread.join()
        return "".join(self.lines)


@contextmanager
def running_server(*models: str, flags: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """The addresses of a ready server with ``models``, or the demo model, for gRPC and HTTP.

    Its exit code must be 0. It computes like plain diffusers: float32, no autocast. A model is
    NAME=FOLDER; ``flags`` are further ones.
    """
    command = [
        sys.executable,
        "-m",
        "darkroom_server",
        "serve",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--http-port",
        "0",
        "--dtype",
        "float32",
        "--no-autocast",
        "--no-channels-last",
        "--threads",
        "1",
        "--rows",
        "4",
        *(flag for model in models for flag in ("--model", model)),
        *flags,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        log = LogReader(server.stderr)
        try:
            log.located.wait(READY_SECONDS)
            if not log.address:
                server.kill()
                pytest.fail(f"the server did not start:\n{log.join()}")
            with Client(log.address, insecure=True) as client:
                client.wait_until_ready(READY_SECONDS)
            yield log.address, log.http
        finally:
            server.terminate()
            code = server.wait(60)
        assert code == 0, log.join()


@pytest.fixture(scope="session")
def addresses() -> Iterator[tuple[str, str]]:
    """The addresses of one server for all tests."""
    with running_server() as found:
        yield found


@pytest.fixture(scope="session")
def address(addresses: tuple[str, str]) -> str:
    """Its address for gRPC."""
    return addresses[0]


@pytest.fixture(scope="session")
def http_url(addresses: tuple[str, str]) -> str:
    """Its URL for HTTP."""
    return f"http://{addresses[1]}"
