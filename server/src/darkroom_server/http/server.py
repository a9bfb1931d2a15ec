"""The HTTP server: its port, its connections and their end."""

import asyncio
import socket
import ssl

import uvicorn
from uvicorn.server import ServerState

from darkroom_server.core.errors import StartupError
from darkroom_server.http.connection import IDLE_SECONDS, MAX_HEADER_BYTES, Connection
from darkroom_server.http.door import HttpDoor

HANDSHAKE_SECONDS = 20.0
BACKLOG = 512
EVERY_ADDRESS = ("0.0.0.0", "::")


class HttpServer:
    """Serves ``door`` over HTTP/1.1 on the running event loop; used at most once.

    It uses uvicorn's protocol and not its server, which would take over the process's signals.
    """

    def __init__(self, door: HttpDoor, tls: ssl.SSLContext | None = None) -> None:
        self._door = door
        self._tls = tls
        self._config = uvicorn.Config(
            door,
            http=Connection,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> str:
        """Open the port (0 picks one) and serve; returns the address.

        Raises ``StartupError`` if the port cannot be bound.
        """
        self._config.load()
        try:
            listening = _listen(host, port)
        except OSError as error:
            raise StartupError(
                f"cannot listen on {host}:{port} for HTTP: {error.strerror}; choose another with "
                "--http-port or --http-host"
            ) from None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self._config, self._state, {}, loop),
            sock=listening,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_SECONDS if self._tls else None,
            backlog=BACKLOG,
        )
        bound = listening.getsockname()[1]
        return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

    def close_port(self) -> None:
        """Accept no more connections, and end those that are idle.

        The others end with their answer.
        """
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()

    async def stop(self, grace: float) -> None:
        """Give running handlers at most ``grace`` seconds, then end every connection."""
        self.close_port()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=grace)
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._state.connections):
            connection.transport.abort()


def _listen(host: str, port: int) -> socket.socket:
    if host in EVERY_ADDRESS and socket.has_dualstack_ipv6():
        return socket.create_server(
            ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
        )
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG)
