"""A real server with the demo model, as a context manager."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tools.lifetime import dying_with_parent

STOP_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Running:
    """Addresses of the server; ``pid`` is the serving process, the parent of the engine's."""

    address: str
    metrics: str
    pid: int


@contextmanager
def server(*flags: str) -> Iterator[Running]:
    """`darkroom-server serve` on free ports; ready when the block starts."""
    process = subprocess.Popen(
        [
            *dying_with_parent(signal.SIGKILL),
            *(sys.executable, "-m", "darkroom_server", "serve", "--log-format", "json"),
            *("--port", "0", "--metrics-port", "0", *flags),
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    reader: threading.Thread | None = None
    try:
        entry = _until_serving(process)
        reader = threading.Thread(target=_drain, args=(process,), daemon=True)
        reader.start()
        yield Running(entry["address"], entry["metrics"], process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
        if reader is not None:
            reader.join()
        if process.stderr is not None:
            process.stderr.close()


def _until_serving(process: "subprocess.Popen[str]") -> dict[str, str]:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("{"):
            entry: dict[str, str] = json.loads(line)
            if entry["event"] == "serving":
                return entry
    raise RuntimeError("the server did not start:\n" + "".join(lines[-20:]))


def _drain(process: "subprocess.Popen[str]") -> None:
    """Read its log, so that it never blocks on a full pipe."""
    assert process.stderr is not None
    for _ in process.stderr:
        pass
