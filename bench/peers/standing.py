"""Servers that stand still while another one is measured."""

from collections.abc import Iterator
from contextlib import contextmanager

from bench.peers.process import PeerProcess, start_peer
from bench.peers.registry import Peer
from bench.peers.servers.config import ServerConfig


class StandingServers:
    """One server of each peer, stopped by SIGSTOP except while it is measured.

    So peers can take turns of seconds: the speed of a shared machine changes within minutes, and a
    start of each server between two turns would leave them far apart.
    """

    def __init__(self) -> None:
        self._servers: dict[str, tuple[ServerConfig, PeerProcess]] = {}

    @contextmanager
    def serving(self, peer: Peer, config: ServerConfig) -> Iterator[PeerProcess]:
        """The server of ``peer``, started the first time and if ``config`` has changed.

        It ends if the block raises. Raises ``RuntimeError`` if it does not start, or does not
        answer any more after it stood still.
        """
        process = self._server_of(peer, config)
        try:
            process.resume()
            yield process
        except BaseException:
            self._end(peer.name)
            raise
        process.is_new = False
        process.pause()

    def close(self) -> None:
        """End all of them."""
        for name in list(self._servers):
            self._end(name)

    def _server_of(self, peer: Peer, config: ServerConfig) -> PeerProcess:
        if peer.name in self._servers:
            before, process = self._servers[peer.name]
            if before == config:
                return process
            self._end(peer.name)
        process = start_peer(peer, config)
        self._servers[peer.name] = config, process
        return process

    def _end(self, name: str) -> None:
        _, process = self._servers.pop(name)
        process.stop()
