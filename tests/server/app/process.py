"""A server with the fake engine in its own process, and its log.

SIGUSR1 lets the engine take the four passes of a default job. With ``images`` its model takes
images and two adapters.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}

MAIN = """
import dataclasses, json, signal, sys
import structlog
from darkroom_server import cli, app  # In the order of the real command.
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.core.adapters import AdapterOffer

log = structlog.get_logger()
options = json.loads(sys.argv[1])
if options.pop("images", False):
    offers = [AdapterOffer(id=name, rank=4, bytes=500) for name in ("ink", "grain")]
    options["models"] = [dataclasses.replace(fake_image_model(), adapters=tuple(offers))]
engine = FakeEngine(on_submit=lambda job: log.info("submitted", job=job.request_id), **options)
signal.signal(signal.SIGUSR1, lambda *_: engine.advance(4))
app.build_engines = lambda _: [engine]
cli.main(["serve", "--port", "0", "--metrics-port", "0", *sys.argv[2:]])
"""


class ServerProcess:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.lines: list[str] = []  # All that was read of standard error so far.

    @property
    def pid(self) -> int:
        return self._process.pid

    def until(self, event: str) -> dict[str, Any]:
        """The first log entry called ``event`` from now on."""
        assert self._process.stderr
        before = len(self.lines)
        for line in self._process.stderr:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("{") and json.loads(line)["event"] == event:
                entry: dict[str, Any] = json.loads(line)
                return entry
        raise AssertionError("\n".join([f"no {event!r} in", *self.lines[before:]]))

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(60)

    def rest(self) -> list[str]:
        """Return the rest of standard error."""
        assert self._process.stderr
        rest = self._process.stderr.read().splitlines()
        self.lines += rest
        return rest


@contextmanager
def start(*flags: str, env: dict[str, str] | None = None, **engine: Any) -> Iterator[ServerProcess]:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, json.dumps(engine), *flags],
        env=CLEAN | (env or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield ServerProcess(process)
        finally:
            process.kill()
