"""The HTTP port that Prometheus reads, and where probes without gRPC ask."""

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from threading import Thread, Timer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from darkroom_server.core.errors import StartupError

STALLED_SECONDS = 10.0
"""A client that neither reads nor writes for so long is let go."""

CONNECTION_SECONDS = 60.0
"""The most that one answer may take, for those who read or write a byte now and then."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection: who stalls, stalls alone."""

    daemon_threads = True
    request_queue_size = 64

    def server_bind(self) -> None:
        """Bind, without ``HTTPServer``'s look at DNS for the machine's own name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one client, and hang up on it when its time is over."""
        timer = Timer(CONNECTION_SECONDS, _hang_up, [request])
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()

    def handle_error(self, *_: Any) -> None:
        """Ignore a client that disconnects during its request."""


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    timeout = STALLED_SECONDS

    def log_message(self, *_: Any) -> None:
        """Scrapes are not worth a line each."""


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
        # The server's loop looks up every half second, or when somebody knocks.
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
