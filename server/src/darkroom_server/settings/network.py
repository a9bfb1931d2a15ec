"""Where the server listens, and who may come in."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where the server listens."""

    host: Annotated[
        str,
        Setting(
            "The address to listen on for calls.",
            choose="`0.0.0.0` or `::` lets other machines in, and needs TLS or `--insecure`.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Ge(0),
        Le(65535),
        Setting("The port for gRPC; 0 picks a free one.", metavar="PORT"),
    ] = 50051
    server_id: Annotated[
        str | None,
        Setting(
            "The name of this server, which clients get with each accepted job.",
            choose="If servers share one name, give each a `HOST:PORT` that clients resolve to its "
            "address: a client then cancels a job at the server that has it.",
            metavar="NAME",
            default="the host's name and the gRPC port, as `HOST:PORT`",
        ),
    ] = None
    metrics_host: Annotated[
        str,
        Setting(
            "The address to serve metrics on, in plain HTTP and to everybody.",
            choose="`0.0.0.0` lets Prometheus in from another machine.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1"
    metrics_port: Annotated[
        int,
        Ge(0),
        Le(65535),
        Setting("The port for Prometheus; 0 picks a free one.", metavar="PORT"),
    ] = 9464
    reflection: Annotated[
        bool,
        Setting(
            "Let tools such as grpcurl ask what the server offers.",
            choose="With `--tokens`, only callers that are `admin` may ask.",
        ),
    ] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """Who may come in, and who else may listen."""

    tls_cert: Annotated[
        str | None,
        Setting(
            "The server's certificate and those between it and its CA, as PEM.",
            choose="Files for TLS are read again when they change, and new connections have the "
            "new ones.",
            metavar="FILE",
            default="none: calls travel readable",
        ),
    ] = None
    tls_key: Annotated[
        str | None,
        Setting(
            "The certificate's private key, as PEM without a password.",
            metavar="FILE",
            default="none",
        ),
    ] = None
    tls_client_ca: Annotated[
        str | None,
        Setting(
            "Take only callers with a certificate that one of these signed, as PEM.",
            metavar="FILE",
            default="none: callers need no certificate",
        ),
    ] = None
    tokens: Annotated[
        str | None,
        Setting(
            "Take only callers with a token of this file; health stays open to all.",
            choose="`darkroom-server token NAME` makes a token and its lines for the file, which "
            "is read again when it changes. See docs/security.md.",
            metavar="FILE",
            default="none: everybody may call",
        ),
    ] = None
    insecure: Annotated[
        bool,
        Setting(
            "Listen beyond this machine without TLS.",
            choose="For a mesh or a proxy that ends TLS itself. The container image says so; a "
            "certificate goes before it.",
        ),
    ] = False
