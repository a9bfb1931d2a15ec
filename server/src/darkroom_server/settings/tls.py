"""The TLS files, from the settings."""

from darkroom_server.core.errors import StartupError
from darkroom_server.security.tls import Files
from darkroom_server.settings.network import Security


def tls_files(security: Security) -> Files | None:
    """Return the TLS files, None without TLS; raises ``StartupError`` if some are missing."""
    if security.tls_cert and security.tls_key:
        return Files(cert=security.tls_cert, key=security.tls_key, client_ca=security.tls_client_ca)
    if security.tls_cert or security.tls_key:
        raise StartupError("--tls-cert and --tls-key go together; only one of them was given")
    if security.tls_client_ca:
        raise StartupError("--tls-client-ca asks callers for certificates: give --tls-cert too")
    return None
