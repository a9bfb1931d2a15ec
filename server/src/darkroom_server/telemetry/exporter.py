"""The HTTP port that Prometheus reads, and where probes without gRPC ask."""

import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from threading import Lock, Semaphore, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from darkroom_server.core.errors import StartupError

STALLED_SECONDS = 5.0
"""A client that neither reads nor writes for this long is disconnected."""

CONNECTION_SECONDS = 10.0
"""The most that one connection may take, even if the client reads or writes now and then."""

MAX_CONNECTIONS = 32
"""Each takes one thread. If all are in use, a new connection replaces the oldest one."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection, so that a stalled client delays no other; a bounded number."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._free = Semaphore(MAX_CONNECTIONS)
        self._lock = Lock()
        self._open: dict[socket.socket, float] = {}
        """The deadline of each connection, the oldest first."""

    def server_bind(self) -> None:
        """Bind, without the DNS query for the machine's name that ``HTTPServer`` makes."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer one client on its own thread, once there is one."""
        if not self._free.acquire(blocking=False):
            self._disconnect(count=1)
            self._free.acquire()  # Soon: the thread of a closed connection ends by itself.
        with self._lock:
            self._open[request] = time.monotonic() + CONNECTION_SECONDS
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # The system has no thread left.
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one client, and free its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def service_actions(self) -> None:
        """Disconnect the clients whose time is over; called twice a second."""
        now = time.monotonic()
        with self._lock:
            late = sum(deadline <= now for deadline in self._open.values())
        self._disconnect(late)

    def handle_error(self, *_: Any) -> None:
        """Ignore a client that disconnects during its request."""

    def _disconnect(self, count: int) -> None:
        """Shut down the ``count`` oldest connections; their threads see the end of the stream."""
        with self._lock:
            for connection in list(self._open)[:count]:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            del self._open[connection]
        self._free.release()


class _Handler(WSGIRequestHandler):
    timeout = STALLED_SECONDS

    def log_message(self, *_: Any) -> None:
        """Scrapes are not logged."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _ServerAny(_Server6):
    """For every address of the machine, of both families, as gRPC takes "0.0.0.0" and "::"."""

    def server_bind(self) -> None:
        """Take IPv4 too."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class Exporter:
    """Serves a registry and the readiness, on threads that a busy event loop does not hide.

    ``ready`` is asked by ``/healthz``, from those threads.
    """

    def __init__(self, registry: CollectorRegistry, ready: Callable[[], bool]) -> None:
        self._metrics = make_wsgi_app(registry, disable_compression=False)
        self._ready = ready
        self._host = ""
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None

    def start(self, host: str, port: int) -> str:
        """Open the port (0 picks one); returns the address. Raises ``StartupError``."""
        kind, bound = (_Server6 if ":" in host else _Server), host
        if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():
            kind, bound = _ServerAny, "::"
        try:
            self._server = make_server(bound, port, self._answer, kind, _Handler)
        except OSError as error:
            raise StartupError(
                f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another with "
                "--metrics-port or --metrics-host"
            ) from None
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        self._host, port = host, self._server.server_port
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def stop(self) -> None:
        """Close the port."""
        if self._server is None or self._thread is None:
            return
        # The server's loop checks every half second, or when a client connects.
        shutdown = Thread(target=self._server.shutdown)
        shutdown.start()
        with suppress(OSError):
            port = self._server.server_port
            socket.create_connection((self._host, port), timeout=1.0).close()
        shutdown.join()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        match environ.get("PATH_INFO"):
            case "/metrics":
                # It returns a list of bytes; its types say less.
                return self._metrics(environ, start_response)  # type: ignore[no-any-return]
            case "/healthz":
                ready = self._ready()
                status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
                text = "ready\n" if ready else "not ready\n"
            case _:
                status, text = HTTPStatus.NOT_FOUND, "try /metrics or /healthz\n"
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        start_response(f"{status.value} {status.phrase}", headers)
        return [text.encode()]
