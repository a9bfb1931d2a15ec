"""Servers of one ledger, each in its own process, that a run can kill, freeze or cut off."""

import asyncio
import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from darkroom_client import AsyncClient
from tests.faults.partition import Link
from tests.server.app.process import CLEAN, MAIN
from tools.lifetime import dying_with_parent
from tools.postgres import Cluster

START_SECONDS = 300

REAL_MAIN = """
import sys
import structlog
from darkroom_server import cli
from darkroom_server.backends.process import ProcessEngine

log = structlog.get_logger()
submit = ProcessEngine.submit


def logged(self, job):
    log.info("submitted", job=job.request_id)
    submit(self, job)


ProcessEngine.submit = logged
cli.main(["serve", "--port", "0", "--metrics-port", "0", *sys.argv[2:]])
"""
"""As ``MAIN``, with the demo model in the real engine."""

KINDS = ("SIGKILL", "SIGSTOP", "partition")


class LoggedServer:
    """A server in a process, its log in the file ``log``; ``serving`` waits until it serves.

    ``engine``: the arguments of the fake engine, or ``real=True`` for the real one.
    """

    def __init__(self, log: Path, *flags: str, **engine: Any) -> None:
        main = REAL_MAIN if engine.get("real") else MAIN
        self.address = ""
        self._log = log
        self._read = 0
        self._submitted: Counter[str] = Counter()
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *dying_with_parent(signal.SIGKILL),
                    *(sys.executable, "-c", main, json.dumps(engine), *flags),
                    *("--log-format", "json", "--state-dir", str(log.parent)),
                ],
                env={**CLEAN, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    async def serving(self) -> None:
        """Wait until it serves; raises ``RuntimeError`` if it does not."""
        async with asyncio.timeout(START_SECONDS):
            while not self.address:
                if self.process.poll() is not None:
                    raise RuntimeError(f"a server did not start:\n{self._log.read_text()}")
                for line in self._log.read_text().splitlines():
                    if line.startswith("{") and '"event": "serving"' in line:
                        self.address = json.loads(line)["address"]
                await asyncio.sleep(0.05)

    def submitted(self) -> Counter[str]:
        """How often its engine was given each job, by request id."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        for line in text.splitlines():
            if b'"submitted"' in line and (entry := json.loads(line))["event"] == "submitted":
                self._submitted[entry["job"]] += 1
        return self._submitted

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


class ServerFleet:
    """The servers of the ledger in ``database``; ``fronts``: clients of those that serve, by name.

    Their logs are in ``folder``. ``engine`` and ``flags`` as of ``LoggedServer``.
    """

    def __init__(self, database: Cluster, folder: Path, *flags: str, **engine: Any) -> None:
        self.fronts: dict[str, AsyncClient] = {}
        self._database = database
        self._folder = folder
        self._flags = flags
        self._engine = engine
        self._serial = itertools.count(1)
        self._servers: dict[str, LoggedServer] = {}
        self._links: dict[str, Link] = {}
        self._away: dict[str, str] = {}
        self._left: list[AsyncClient] = []

    @property
    def frozen(self) -> int:
        """How many servers were cut off or frozen, and come back with ``thaw``."""
        return sum(kind != "SIGKILL" for kind in self._away.values())

    async def add(self) -> None:
        """Start one more, whose way to the database can be cut."""
        name = f"s{next(self._serial)}"
        link = self._links[name] = await Link.to(self._database.port)
        ledger = f"postgresql://postgres@127.0.0.1:{link.port}/postgres"
        server = self._servers[name] = LoggedServer(
            self._folder / f"{name}.log",
            *("--ledger", ledger, "--server-id", name, *self._flags),
            **self._engine,
        )
        await server.serving()
        self.fronts[name] = AsyncClient(server.address)

    def take_away(self, name: str, kind: str) -> None:
        """Kill a server, freeze it, or cut it off from the database; it gets no new calls."""
        self._away[name] = kind
        # Its calls go on until their time limits, as those of a caller do.
        self._left.append(self.fronts.pop(name))
        match kind:
            case "SIGKILL":
                self._servers[name].send(signal.SIGKILL)
            case "SIGSTOP":
                self._servers[name].send(signal.SIGSTOP)
            case _:
                self._links[name].cut()

    def thaw(self) -> None:
        """Frozen servers go on, and learn that their jobs are others' by now."""
        for name, kind in self._away.items():
            if kind != "SIGKILL":
                self._links[name].heal()
                self._servers[name].send(signal.SIGCONT)

    def submitted(self) -> dict[str, Counter[str]]:
        """How often the engine of each server was given each job, by request id."""
        return {name: server.submitted() for name, server in self._servers.items()}

    async def close(self) -> None:
        """Kill all of them."""
        for server in self._servers.values():
            server.close()
        for client in (*self._left, *self.fronts.values()):
            await client.close()
        for link in self._links.values():
            await link.close()
