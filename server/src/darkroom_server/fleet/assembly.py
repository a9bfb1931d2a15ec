"""A server's place in its fleet, from its settings."""

import socket

import grpc

from darkroom_server.core.ledger import Announcement, ServerEntry, SharedLedger
from darkroom_server.dispatch import Dispatcher, LedgerEntries, ResultStore
from darkroom_server.fleet.member import FleetMember, FleetObserver
from darkroom_server.fleet.peers import Peers
from darkroom_server.security.fleet_tokens import new_fleet_key
from darkroom_server.security.tls import Files, own_name, peer_credentials, read_pem
from darkroom_server.service.generation import GenerationService
from darkroom_server.settings import Settings

ANY_ADDRESS = ("", "0.0.0.0", "::")


class Fleet:
    """Makes the ``member`` of a shared ledger; ``key``: what calls of other servers must show.

    ``certificates``: those that the gRPC port serves, None without TLS.
    """

    def __init__(
        self,
        ledger: SharedLedger,
        entries: LedgerEntries,
        dispatcher: Dispatcher,
        results: ResultStore,
        service: GenerationService,
        observer: FleetObserver,
        certificates: Files | None,
        settings: Settings,
    ) -> None:
        self.key = new_fleet_key()
        self._certificates = certificates
        self.member = FleetMember(
            ledger,
            entries,
            dispatcher,
            results,
            service.durability,
            Peers(observer, self._credentials),
            observer,
            reattach_grace=settings.results.reattach_grace,
            claim_delay=settings.storage.claim_delay,
        )
        service.share(self.member)

    def start(self, address: str | None, bound: str) -> None:
        """Appear in the ledger; ``address``: the configured one, ``bound``: that of its port."""
        certificate = b""
        if self._certificates is not None:
            certificate = read_pem("--tls-cert", self._certificates.cert)
            certificate = f"{own_name(self._certificates)}\n".encode() + certificate
        self.member.start(
            Announcement(address=address or reachable(bound), key=self.key, certificate=certificate)
        )

    def _credentials(self, server: ServerEntry) -> tuple[grpc.ChannelCredentials, str]:
        # OpenSSL skips what stands before a certificate.
        name = server.certificate.partition(b"\n")[0].decode()
        return peer_credentials(self._certificates, server.certificate), name


def join_fleet(
    entries: LedgerEntries,
    dispatcher: Dispatcher,
    results: ResultStore,
    service: GenerationService,
    observer: FleetObserver,
    certificates: Files | None,
    settings: Settings,
) -> Fleet | None:
    """The place in the fleet of a server whose ledger others share; None if they do not."""
    if entries.shared is None:
        return None
    return Fleet(
        entries.shared,
        entries,
        dispatcher,
        results,
        service,
        observer,
        certificates,
        settings,
    )


def reachable(bound: str) -> str:
    """Where other machines find the port ``bound``, if it listens on all addresses."""
    host, _, port = bound.rpartition(":")
    return f"{socket.gethostname()}:{port}" if host.strip("[]") in ANY_ADDRESS else bound
