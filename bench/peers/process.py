"""The processes of a peer's server: start, resources, stop."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from bench.peers.ready import is_ready
from bench.peers.registry import WORK, Peer
from bench.peers.servers.config import ServerConfig
from bench.report.results import ROOT

START_SECONDS = 180
"""Start timeout."""

RESUME_SECONDS = 30
"""Timeout of a server that stood still."""

STOP_SECONDS = 20

IDLE_SECONDS = 3.0
"""Duration of the measurement without requests."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of all processes of a server, in bytes.

    ``proportional`` divides pages among the processes that map them (PSS); ``resident`` counts them
    for each process (RSS).
    """

    processes: int
    proportional: int
    resident: int


class PeerProcess:
    """A server that is ready; it took ``ready_seconds`` from the start of its process.

    ``is_new``: it has served no load yet. Raises ``RuntimeError`` with the end of its log if it
    does not start.
    """

    def __init__(self, peer: Peer, config: ServerConfig) -> None:
        self.peer = peer
        self.port = config.port
        self.trace = Path(config.trace)
        self.is_new = True
        began = time.monotonic()
        logs = WORK / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{peer.name}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    str(peer.python),
                    *("-m", f"{peer.package}.{peer.module}"),
                    *config.arguments(),
                ],
                cwd=ROOT,
                env=environment_of(peer),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(began + START_SECONDS)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.monotonic() - began

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._process.pid

    def footprint(self) -> Footprint:
        """The memory of its processes now."""
        infos = []
        for process in self._tree():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                infos.append(process.memory_full_info())
        return Footprint(len(infos), sum(i.pss for i in infos), sum(i.rss for i in infos))

    def cpu_seconds(self) -> float:
        """CPU seconds of its processes so far, including its children that have exited."""
        total = 0.0
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def idle_cpu(self) -> float:
        """The share of a core that its processes use without requests."""
        before = self.cpu_seconds()
        began = time.monotonic()
        time.sleep(IDLE_SECONDS)
        return (self.cpu_seconds() - before) / (time.monotonic() - began)

    def pause(self) -> None:
        """Let all of its processes stand still; returns when they do."""
        self._signal(signal.SIGSTOP)
        while not all(map(_stands_still, self._tree())):
            time.sleep(0.001)

    def resume(self) -> None:
        """Let all of its processes go on; returns when the server answers.

        Raises ``RuntimeError`` with the end of its log if it does not.
        """
        self._signal(signal.SIGCONT)
        self._wait_until_ready(time.monotonic() + RESUME_SECONDS)

    def stop(self) -> None:
        """Send SIGTERM, then kill the processes that remain."""
        self._signal(signal.SIGCONT)  # One that stands still would not see SIGTERM.
        tree = self._tree()
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        _, alive = psutil.wait_procs(tree, timeout=2)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        self._process.wait(STOP_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        try:
            main = psutil.Process(self._process.pid)
            return [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _wait_until_ready(self, deadline: float) -> None:
        while not is_ready(self.peer.wire, self.port, self.log):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"{self.peer.label} is not ready; the end of its log:\n{tail}")
            time.sleep(0.05)


def _stands_still(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def start_peer(peer: Peer, config: ServerConfig) -> PeerProcess:
    """A fresh server of ``peer`` on a free port, with a new trace."""
    traces = WORK / "traces"
    traces.mkdir(parents=True, exist_ok=True)
    trace = traces / f"{peer.name}.jsonl"
    trace.unlink(missing_ok=True)
    return PeerProcess(peer, replace(config, port=free_port(), trace=str(trace)))


@contextmanager
def serving_peer(peer: Peer, config: ServerConfig) -> Iterator[PeerProcess]:
    """A fresh server of ``peer``, as of ``start_peer``, that ends with the block."""
    process = start_peer(peer, config)
    try:
        yield process
    finally:
        process.stop()


def versions_of(peer: Peer) -> dict[str, str]:
    """The versions of the peer's packages, from its own environment."""
    code = (
        "from importlib.metadata import version; print(*map(version, __import__('sys').argv[1:]))"
    )
    names = (*peer.packages, "diffusers", "torch")
    answer = subprocess.run(
        [str(peer.python), "-c", code, *names], check=True, capture_output=True, text=True
    )
    return dict(zip(names, answer.stdout.split(), strict=True))


def free_port() -> int:
    """A port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment_of(peer: Peer) -> dict[str, str]:
    """The caller's environment without Darkroom's settings, with this repository's sources."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DARKROOM_", "PYTHON"))}
    sources = (ROOT, ROOT / "server" / "src", ROOT / "protos" / "src")
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, sources)),
        "PATH": f"{peer.python.parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
