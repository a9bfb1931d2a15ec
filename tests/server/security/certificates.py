"""A test CA, its certificates as files, and channels that trust it."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import grpc
import trustme

from darkroom_server.settings import Security


class Authority:
    """Signs certificates and writes them to ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def issue(
        self, *names: str, to: str = "server", not_after: datetime | None = None
    ) -> tuple[Path, Path]:
        """Write a certificate and key for ``names``; existing files are replaced."""
        leaf = self._ca.issue_cert(*(names or ("127.0.0.1", "localhost")), not_after=not_after)
        cert, key = self._folder / f"{to}.pem", self._folder / f"{to}.key"
        leaf.private_key_pem.write_to_path(key)
        cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return cert, key

    def security(self, *, client_ca: "Authority | None" = None) -> Security:
        """Return settings with a certificate for this machine."""
        cert, key = self.issue()
        ca = str(client_ca.file) if client_ca else None
        return Security(tls_cert=str(cert), tls_key=str(key), tls_client_ca=ca)

    def channel(self, shown: tuple[Path, Path] | None = None) -> Callable[[str], grpc.aio.Channel]:
        """Return a factory of channels that trust this CA and present a given certificate."""
        cert, key = (path.read_bytes() for path in shown) if shown else (None, None)
        credentials = grpc.ssl_channel_credentials(self.file.read_bytes(), key, cert)
        return lambda address: grpc.aio.secure_channel(address, credentials)
