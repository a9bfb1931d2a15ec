"""A PostgreSQL of its own for tests and demonstrations, in a temporary folder.

PostgreSQL does not run as root, so root starts it as the user ``postgres``. It ends with the
program that started it.
"""

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.lifetime import dying_with_parent

DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
SECONDS = 60


def program(name: str) -> str:
    """The path of a program of PostgreSQL; Debian has the server's not in PATH."""
    for folder in reversed(DEBIAN):
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which(name) or name


class Cluster:
    """A running PostgreSQL in ``folder``; ``url`` is that of an empty database."""

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        self.folder = folder
        self.port = _free_port()
        # A killed database loses nothing without it; a killed machine would.
        self._fsync = "on" if fsync else "off"
        self._process: subprocess.Popen[bytes] | None = None
        _run("initdb", "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "--no-sync")

    @property
    def url(self) -> str:
        """That of the database "postgres"."""
        return self.database("postgres")

    def database(self, name: str, user: str = "postgres") -> str:
        """The URL of a database."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        options = {
            "fsync": self._fsync,
            "unix_socket_directories": str(self.folder),
            "listen_addresses": "127.0.0.1",
            "max_connections": "200",
        }
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                _as_postgres(
                    "postgres", "-D", str(self.folder / "data"), "-p", str(self.port), *flags
                ),
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        ready = ["-h", "127.0.0.1", "-p", str(self.port), "-t", "60", "-q"]
        for _ in range(SECONDS * 10):
            if self._process.poll() is not None:
                raise RuntimeError((self.folder / "log").read_text())
            if subprocess.run([program("pg_isready"), *ready]).returncode == 0:
                return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
        raise TimeoutError("PostgreSQL does not start")

    def kill(self) -> None:
        """Kill it and all its processes, as a power failure of its machine's would."""
        assert self._process
        # Stopped, it starts no more processes. One that is left keeps it from starting again.
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)
        handles = [os.pidfd_open(pid) for pid in self.processes()]
        for handle in handles:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        for handle in handles:
            select.select([handle], [], [])  # Readable when its process has ended.
            os.close(handle)
        self._process.wait()
        self._process = None

    def processes(self) -> list[int]:
        """The ids of its processes, the main one first."""
        main = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        return [main, *_children(main)]

    def stop(self) -> None:
        """Stop it at once, if it runs."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(SECONDS)
            self._process = None


@contextmanager
def cluster(*, fsync: bool = False) -> Iterator[Cluster]:
    """A running cluster, deleted afterwards; ``fsync``: commits are flushed to the disk."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        made = Cluster(folder, fsync=fsync)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def emptied(url: str) -> None:
    """Delete the ledger in a database."""
    import asyncpg

    connection = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA IF EXISTS darkroom CASCADE")
    await connection.close()


def _run(name: str, *arguments: str) -> None:
    subprocess.run(_as_postgres(name, *arguments), check=True, capture_output=True, cwd="/")


def _as_postgres(name: str, *arguments: str) -> list[str]:
    user = "--reuid=postgres", "--regid=postgres", "--init-groups"
    before = dying_with_parent(signal.SIGQUIT, *(user if os.geteuid() == 0 else ()))
    return [*before, program(name), *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in found]
