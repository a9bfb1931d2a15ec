"""(d) Triton with ``--model-control-mode=explicit``: it loads and unloads when a client says so.

nvidia-pytriton binds models at its start and has no way to unload one of them. So this starts the
``tritonserver`` that it brings, with the Python backend, on a model repository.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from threading import Event

from pytriton.server.triton_server import TritonServer
from pytriton.server.triton_server_config import TritonServerConfig
from pytriton.utils.distribution import get_libs_path, get_root_module_path, get_stub_path

from bench.peers.servers.config import READY
from bench.trace.peers.config import PeerConfig, from_wire
from bench.trace.peers.loads import CostedLoads
from bench.trace.peers.model import PeerModel, warm_up
from bench.trace.peers.triton_device import Device
from bench.trace.peers.triton_repository import write_repository

HTTP_THREADS = 64
"""A load keeps one of them, and requests on its connections waiting: by default there are eight."""


class Pipelines:
    """The models that are loaded; see ``Models``."""

    def __init__(self, config: PeerConfig) -> None:
        self._config = config
        self._loads = CostedLoads(config, lambda name: PeerModel(name, config))
        self._models: dict[str, PeerModel] = {}

    def load(self, name: str) -> None:
        """Load a model, for as long as that of a real one takes."""
        self._models[name] = self._loads.load(name)

    def unload(self, name: str) -> None:
        """Forget it."""
        del self._models[name]

    def generate(self, name: str, rows: Sequence[str]) -> list[bytes]:
        """The files of a batch."""
        return self._models[name].generate([from_wire(json.loads(row)) for row in rows])

    def warm_up(self) -> None:
        """See ``model``."""
        warm_up(self._config)


def server_of(config: PeerConfig, folder: Path) -> TritonServer:
    """The server of the repository in ``folder``."""
    # Triton looks for the process of a Python model beside its backend.
    home = get_root_module_path() / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(home / "backends", backends)
    stub = get_stub_path(f"{sys.version_info.major}.{sys.version_info.minor}")
    shutil.copy(stub, backends / "python")
    settings = TritonServerConfig()
    for name, value in {
        "model-repository": str(folder / "models"),
        "model-control-mode": "explicit",
        "backend-directory": str(backends),
        "backend-config": [f"python,shm-region-prefix-name={folder.name}"],
        "http-address": "127.0.0.1",
        "http-port": config.port,
        "http-thread-count": HTTP_THREADS,
        "allow-grpc": False,
        "allow-metrics": False,
        "exit-timeout-secs": 2,
    }.items():
        settings[name] = value
    return TritonServer(
        path=str(home / "bin" / "tritonserver"), libs_path=get_libs_path(), config=settings
    )


def wait_until_ready(server: TritonServer, port: int) -> None:
    """Raises ``RuntimeError`` if it ends before."""
    url = f"http://127.0.0.1:{port}/v2/health/ready"
    while server.is_alive():
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError("tritonserver ended before it was ready")


def main() -> None:
    """Serve until SIGTERM."""
    config = PeerConfig.of_command_line(__doc__)
    stopping = Event()
    # Blocked signals would be blocked in tritonserver too, which is to end by one.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with tempfile.TemporaryDirectory(prefix="triton") as temporary:
        folder = Path(temporary)
        socket = str(folder / "device")
        write_repository(
            folder / "models",
            sorted(each.name for each in Path(config.folder).iterdir()),
            max_images=config.max_batch_images,
            batch_timeout=config.batch_timeout,
            device=socket,
        )
        pipelines = Pipelines(config)
        server = server_of(config, folder)
        with Device(pipelines, socket) as device:
            device.run(pipelines.warm_up)
            server.start()
            try:
                wait_until_ready(server, config.port)
                print(READY, flush=True)
                stopping.wait()
            finally:
                server.stop()


if __name__ == "__main__":
    main()
