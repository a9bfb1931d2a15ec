"""Servers of a fleet replaced by those of another version: `python -m tests.compat.fleet_upgrade`.

Both versions are wheels: the other one of a commit before the ledger's schema changed, and this
checkout. Three servers share a PostgreSQL and a load. One after the other stops, and one of the
other version takes its address. No caller may see an error, and each version must have generated
images. Then the same way back, because an upgrade may have to be undone.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from darkroom_client import AsyncClient
from tests.faults.test_fleet_killed import rows
from tests.server.app.process import CLEAN, MAIN
from tools.lifetime import dying_with_parent, exit_on_sigterm
from tools.postgres import cluster

ROOT = Path(__file__).parents[2]
OTHER = "972a0da4bc58"
"""The last commit whose ledger has schema 1."""

PACKAGES = ("protos", "client", "server")
SERVERS = 3
CALLERS = 6
PASS_SECONDS = 0.02
STEPS = (4, 60)
BETWEEN_SECONDS = 4.0
"""Of load before each replacement."""

START_SECONDS = 120
CALL_SECONDS = 60.0


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", default=OTHER, help="the commit of the other version")
    parser.add_argument("--minutes", type=float, default=10.0, help="the run fails after so long")
    given = parser.parse_args()
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        versions = {
            "other": installed(
                archived(given.other, Path(folder, "source")), Path(folder, "other")
            ),
            "this": installed(ROOT, Path(folder, "this")),
        }
        return asyncio.run(upgrade(versions, Path(folder), given.minutes))


def archived(commit: str, folder: Path) -> Path:
    """The files of a commit in ``folder``."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "archive", commit, "--", *PACKAGES, "LICENSE", "README.md"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    return folder


def installed(source: Path, folder: Path) -> Path:
    """The packages of ``source``, built as wheels and installed into ``folder``, without others."""
    wheels = folder.with_suffix(".wheels")
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
    for package in PACKAGES:
        command = ["build", "--wheel", "--no-isolation", "--outdir", str(wheels)]
        subprocess.run([sys.executable, "-m", *command, str(source / package)], **quiet)
    command = ["pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder)]
    found = map(str, sorted(wheels.glob("*.whl")))
    subprocess.run([sys.executable, "-m", *command, *found], **quiet)
    return folder


class Place:
    """An address with one server at a time; ``logs``: of all that were there, by version."""

    def __init__(self, name: str, url: str, folder: Path) -> None:
        self.name = name
        self.logs: list[tuple[str, Path]] = []
        self._url = url
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]

    @property
    def address(self) -> str:
        """Where callers find it."""
        return f"127.0.0.1:{self._port}"

    async def start(self, version: str, packages: Path) -> None:
        """Start a server of ``version``, and wait until it serves."""
        log = self._folder / f"{self.name}-{len(self.logs)}.log"
        self.logs.append((version, log))
        # The last port is the one that counts.
        flags = [
            *("--ledger", self._url, "--server-id", f"{self.name}-{version}"),
            *("--port", str(self._port), "--max-resident-samples", "4"),
            *("--log-format", "json", "--grace", "20", "--drain-delay", "1"),
        ]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [
                    *dying_with_parent(signal.SIGKILL),
                    *(sys.executable, "-P", "-c", f"{CHECK}{MAIN}"),
                    *(json.dumps({"pass_seconds": PASS_SECONDS}), *flags),
                ],
                env={**CLEAN, "PYTHONPATH": str(packages), "EXPECTED": str(packages)},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=self._folder,
            )
        async with asyncio.timeout(START_SECONDS):
            while '"event": "serving"' not in log.read_text():
                if self._process.poll() is not None:
                    raise RuntimeError(f"a server did not start:\n{log.read_text()}")
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Let it finish what it can, and wait until it has ended."""
        assert self._process
        self._process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(self._process.wait, START_SECONDS)
        if code not in (0, -signal.SIGTERM):
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.logs[-1][1].read_text()}")

    def close(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


CHECK = """
import os, darkroom_server
assert darkroom_server.__file__.startswith(os.environ["EXPECTED"] + "/"), darkroom_server.__file__
"""
"""Fails unless the imported packages are those of the wheel."""


async def upgrade(versions: dict[str, Path], folder: Path, minutes: float) -> int:
    """Replace all servers, and replace them again; returns the exit code."""
    with cluster() as database:
        places = [Place(f"s{number}", database.url, folder) for number in range(SERVERS)]
        try:
            async with asyncio.timeout(minutes * 60):
                began = time.monotonic()
                for each in places:
                    await each.start("other", versions["other"])
                load = Load([each.address for each in places])
                async with asyncio.TaskGroup() as callers:
                    for number in range(CALLERS):
                        callers.create_task(load.call(number))
                    for version in ("this", "other"):
                        for each in places:
                            await asyncio.sleep(BETWEEN_SECONDS)
                            await each.stop()
                            await each.start(version, versions[version])
                            seconds = time.monotonic() - began
                            print(
                                f"{each.name} is of {version!r}; {sum(load.kinds.values())} calls, "
                                f"{len(load.errors)} errors, {seconds:.0f} s",
                                flush=True,
                            )
                    await asyncio.sleep(BETWEEN_SECONDS)
                    load.over.set()
                return judge(load, places, await rows(database.url, "SELECT state FROM jobs"))
        finally:
            for each in places:
                each.close()


class Load:
    """Callers of all servers; ``errors``: what they saw, ``kinds``: their calls by kind."""

    def __init__(self, addresses: list[str]) -> None:
        self.over = asyncio.Event()
        self.errors: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.images: dict[int, set[str]] = {}
        self._addresses = addresses

    async def call(self, caller: int) -> None:
        """Call until it is over, one call after the other."""
        number = caller
        async with AsyncClient(self._addresses) as client:
            while not self.over.is_set():
                kind = ("generate", "stream", "submit")[number // CALLERS % 3]
                seed = number % 50
                steps = STEPS[0] + number * 7 % (STEPS[1] - STEPS[0])
                options = {"seed": seed, "steps": steps}
                try:
                    result = await self._result(client, kind, f"{kind}-{number}", options)
                except Exception as error:
                    self.errors.append(f"{kind} {number}: {error!r}")
                else:
                    digest = hashlib.sha256(result.image.data).hexdigest()
                    self.images.setdefault(seed, set()).add(digest)
                self.kinds[kind] += 1
                number += CALLERS

    async def _result(
        self, client: AsyncClient, kind: str, id: str, options: dict[str, Any]
    ) -> Any:
        match kind:
            case "generate":
                return await client.generate(
                    "a star", request_id=id, timeout=CALL_SECONDS, **options
                )
            case "stream":
                async with client.stream(
                    "a star", request_id=id, timeout=CALL_SECONDS, **options
                ) as stream:
                    return await stream.result()
        await client.submit("a star", request_id=id, timeout=CALL_SECONDS, **options)
        return await client.result(id, CALL_SECONDS)


def judge(load: Load, places: list[Place], left: list[Any]) -> int:
    """Print what was found; returns the exit code."""
    generated = Counter(
        version
        for each in places
        for version, log in each.logs
        for line in log.read_text().splitlines()
        if line.startswith("{") and json.loads(line)["event"] == "submitted"
    )
    states = Counter(row["state"] for row in left)
    print(f"calls: {dict(load.kinds)}; jobs that engines got, by version: {dict(generated)}")
    print(f"jobs in the ledger by state: {dict(states)}")
    failed = {
        "callers saw errors": load.errors,
        "a version generated nothing": len(generated) < 2,
        "equal requests have different images": any(len(e) > 1 for e in load.images.values()),
        "different requests have equal images": len(set().union(*load.images.values()))
        < len(load.images),
        "a job did not finish": states.keys() != {2},
    }
    for what, so in failed.items():
        if so:
            print(f"FAILED: {what}")
    for error in load.errors:
        print(f"  {error}")
    if not any(failed.values()):
        print("no caller saw an error")
    return int(any(map(bool, failed.values())))


if __name__ == "__main__":
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    sys.exit(main())
