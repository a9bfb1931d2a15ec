"""Why the two ends do not agree on TLS: a handshake of our own, since gRPC's error says too little.

gRPC reports one of several addresses, and a server that requires a client certificate only closes
the connection. The probe trusts what the channel trusts, and sends no request and no token.
"""

import socket
import ssl
import time

from darkroom_client._settings import Settings
from darkroom_client._transport.channels import endpoints
from darkroom_client._types.connection import TLS

PROBE_SECONDS = 2.0

_WRONG_NAME = (62, 64)
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""


AGAIN_SECONDS = 0.2
"""A server that shuts down closes connections too; that long after, it does not accept any."""


def find_tls_problem(settings: Settings, seconds: float) -> str:
    """A sentence with the problem and its remedy; empty if TLS works or no server answers."""
    if settings.tls is None or not (problem := _probe(settings, settings.tls, seconds)):
        return ""
    time.sleep(AGAIN_SECONDS)
    return problem if _probe(settings, settings.tls, seconds) == problem else ""


def _probe(settings: Settings, tls: TLS, seconds: float) -> str:
    ends_at = time.monotonic() + min(seconds, PROBE_SECONDS)
    for endpoint in endpoints(settings.target):
        host, _, port = endpoint.rpartition(":")
        host = host.strip("[]")
        try:
            addresses = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except OSError:
            continue
        for family, kind, number, _, address in addresses:
            with socket.socket(family, kind, number) as connection:
                connection.settimeout(max(0.01, ends_at - time.monotonic()))
                try:
                    connection.connect(address)
                except OSError:
                    continue
                return _handshake(connection, tls, host, settings.target)
    return ""


def _handshake(connection: socket.socket, tls: TLS, host: str, target: str) -> str:
    name = tls.server_name or host
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.ca is None:
        # gRPC has roots of its own, which may differ from this machine's.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.cert is not None:
        context.load_cert_chain(tls.cert, tls.key)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=name) as encrypted:
            # A server that speaks HTTP/2 sends its settings first.
            if encrypted.recv(1):
                return ""
            return _certificate_problem(tls, target)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _WRONG_NAME:
            return (
                f"TLS: the certificate of the server at {target} is not valid for the name "
                f"{name!r}: set server_name to a name that is in it (TLS(server_name=...))"
            )
        return (
            f"TLS: the certificate of the server at {target} is not signed by an authority in "
            f"{tls.ca} ({error.verify_message}): set ca to the certificate of its authority "
            "(TLS(ca=...), DARKROOM_CA)"
        )
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):
            return _certificate_problem(tls, target)
        return (
            f"TLS: the server at {target} does not speak TLS ({error.reason}): connect without "
            "tls, or to its TLS port"
        )
    except OSError:
        return ""


def _certificate_problem(tls: TLS, target: str) -> str:
    if tls.cert is None:
        return (
            f"TLS: the server at {target} closes the connection after the handshake: it requires "
            "a client certificate (TLS(cert=..., key=...))"
        )
    return (
        f"TLS: the server at {target} does not accept the client certificate {tls.cert}: it must "
        "be signed by an authority that the server trusts"
    )
