"""The HTTP port that Prometheus reads."""

import socket
from contextlib import suppress
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from darkroom_server.core.errors import StartupError


class Exporter:
    """Serves a registry on a thread of its own, so that a busy event loop does not hide it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._host = ""
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None

    def start(self, host: str, port: int) -> str:
        """Open the port (0 picks one); returns the address. Raises ``StartupError``."""
        try:
            self._server, self._thread = start_http_server(port, host, registry=self._registry)
        except OSError as error:
            raise StartupError(
                f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another with "
                "--metrics-port or --metrics-host"
            ) from None
        self._host, port = host, self._server.server_port
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def stop(self) -> None:
        """Close the port."""
        if self._server is None or self._thread is None:
            return
        # The server's loop looks up every half second, or when somebody knocks.
        shutdown = Thread(target=self._server.shutdown)
        shutdown.start()
        with suppress(OSError):
            socket.create_connection((self._host, self._server.server_port), timeout=1.0).close()
        shutdown.join()
        self._server.server_close()
        self._thread.join()
