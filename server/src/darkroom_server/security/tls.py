"""TLS certificates: read, checked by a handshake in memory, and reloaded when they change."""

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from darkroom_server.core.errors import StartupError
from darkroom_server.security.reloading_file import ReloadingFile

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Paths of PEM files; ``client_ca`` signs client certificates, None without mutual TLS."""

    cert: str
    key: str
    client_ca: str | None = None

    @property
    def paths(self) -> list[str]:
        """The paths that are set."""
        return [path for path in (self.cert, self.key, self.client_ca) if path]


@dataclass(frozen=True, slots=True)
class Pair:
    """The checked contents of the files; ``names`` are the certificate's subjectAltNames."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    names: tuple[str, ...]
    expires: str


def server_credentials(files: Files) -> grpc.ServerCredentials:
    """Return credentials that reload the files; raises ``StartupError`` for unusable files.

    If a later pair is broken, that is logged, and new connections use the previous pair.
    """
    pair = ReloadingFile("certificates", files.paths, lambda: read_pair(files))
    served = pair.current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        # gRPC calls this at every handshake, on its own thread. None means unchanged.
        nonlocal served
        current = pair.current()
        if current is served:
            return None
        served = current
        return _configuration(current)

    log.info("tls", names=served.names, expires=served.expires, mutual=bool(served.client_ca))
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        _configuration(served),
        fetch,  # type: ignore[arg-type]  # The types do not know that None is allowed.
        require_client_authentication=served.client_ca is not None,
    )
    return credentials


def server_ssl_context(files: Files) -> ssl.SSLContext:
    """Return a context for HTTP that reloads the files, as ``server_credentials`` does."""
    contexts = ReloadingFile("certificates of HTTP", files.paths, lambda: _ssl_context(files))
    listening = _ssl_context(files)

    def use_newest(handshake: ssl.SSLObject, name: str | None, own: ssl.SSLContext) -> None:
        # OpenSSL calls this at every handshake, also if the caller names no server.
        handshake.context = contexts.current()

    listening.sni_callback = use_newest
    return listening


def _ssl_context(files: Files) -> ssl.SSLContext:
    pair = read_pair(files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.cert, files.key, password="")
    except (ssl.SSLError, OSError):
        raise StartupError(f"--tls-cert {files.cert}: changed while it was read") from None
    if pair.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=pair.client_ca.decode("ascii", "replace"))
    return context


def own_credentials(files: Files) -> tuple[grpc.ChannelCredentials, str]:
    """Return credentials for a probe on the server's own machine, and the name to expect.

    They trust only the server's certificate. With mutual TLS they also present it as the client
    certificate. Raises ``StartupError``.
    """
    return peer_credentials(files, read_pair(files).cert), own_name(files)


def own_name(files: Files) -> str:
    """The name that callers may expect in the server's certificate; raises ``StartupError``."""
    return read_pair(files).names[0].replace("*", "any")


def peer_credentials(files: Files | None, certificate: bytes) -> grpc.ChannelCredentials:
    """Return credentials that trust only ``certificate``, that of one other server.

    With mutual TLS they present the server's own one of ``files``. Raises ``StartupError``.
    """
    if files is None or not files.client_ca:
        return grpc.ssl_channel_credentials(certificate)
    pair = read_pair(files)
    return grpc.ssl_channel_credentials(certificate, pair.key, pair.cert)


def _configuration(pair: Pair) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.cert)], pair.client_ca)


def read_pair(files: Files) -> Pair:
    """Return the files' bytes after a test handshake with them; raises ``StartupError``."""
    before = _read(files)
    decoded = _handshake(files)
    cert, key, client_ca = _read(files)
    if before != (cert, key, client_ca):
        raise StartupError(f"--tls-cert {files.cert}: changed while it was read")
    names = tuple(str(name) for _, name in decoded.get("subjectAltName", ()))
    if not names:
        raise StartupError(f"--tls-cert {files.cert}: names no host (subjectAltName is empty)")
    return Pair(cert, key, client_ca, names, str(decoded["notAfter"]))


def _read(files: Files) -> tuple[bytes, bytes, bytes | None]:
    return (
        read_pem("--tls-cert", files.cert),
        read_pem("--tls-key", files.key),
        read_pem("--tls-client-ca", files.client_ca) if files.client_ca else None,
    )


def read_pem(flag: str, path: str) -> bytes:
    """Return a file's bytes; raises ``StartupError`` that names ``flag``."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartupError(f"{flag} {path}: cannot be read: {error.strerror}") from None


def _handshake(files: Files) -> dict[str, Any]:
    """Return the decoded certificate after a handshake in memory that trusts only it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        client.load_verify_locations(files.cert)
    except (ssl.SSLError, OSError):
        raise StartupError(f"--tls-cert {files.cert}: holds no certificate in PEM") from None
    try:
        server.load_cert_chain(files.cert, files.key, password="")
    except (ssl.SSLError, OSError) as error:
        raise StartupError(f"--tls-key {files.key}: {_why_no_pair(error)}") from None
    if files.client_ca:
        try:
            server.load_verify_locations(files.client_ca)
        except (ssl.SSLError, OSError):
            wrong = f"--tls-client-ca {files.client_ca}: holds no certificate in PEM"
            raise StartupError(wrong) from None
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    try:
        for side in (theirs, ours, theirs, ours):
            _advance(side)
    except ssl.SSLCertVerificationError as error:
        raise StartupError(f"--tls-cert {files.cert}: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise StartupError(f"--tls-cert {files.cert}: cannot be served: {error.reason}") from None
    return dict(theirs.getpeercert() or {})


def _advance(side: ssl.SSLObject) -> None:
    with suppress(ssl.SSLWantReadError):
        side.do_handshake()


def _why_no_pair(error: OSError) -> str:
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return "belongs to another certificate"
    return "holds no private key in PEM without a password"
