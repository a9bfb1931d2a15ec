"""Settings of the network: addresses, TLS, tokens."""

from dataclasses import dataclass
from ipaddress import ip_network
from typing import Annotated

from annotated_types import Ge, Le, Predicate

from darkroom_server.settings.option import Setting


def _are_networks(value: str) -> bool:
    try:
        return all(ip_network(network.strip()) for network in value.split(","))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where the server listens."""

    host: Annotated[
        str,
        Setting(
            "The address to listen on for gRPC.",
            choose="`0.0.0.0` or `::` accepts other machines, and needs TLS or `--insecure`.",
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
    fleet_address: Annotated[
        str | None,
        Setting(
            "Where the other servers of a shared `--ledger` reach this one over gRPC.",
            choose="In Kubernetes the address of the pod, with the port.",
            metavar="HOST:PORT",
            default="`--host`, or the host's name if that is every address, and the gRPC port",
        ),
    ] = None
    metrics_host: Annotated[
        str,
        Setting(
            "The address to serve metrics on, over plain HTTP and without authentication.",
            choose="`0.0.0.0` lets Prometheus scrape from another machine.",
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
            "Serve gRPC reflection, for tools such as grpcurl.",
            choose="With `--tokens`, only `admin` callers may use it.",
        ),
    ] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """TLS and tokens."""

    tls_cert: Annotated[
        str | None,
        Setting(
            "The server's certificate, followed by its intermediate certificates, as PEM.",
            choose="The server reads the TLS files again when they change; new connections use "
            "the new ones.",
            metavar="FILE",
            default="none (plaintext)",
        ),
    ] = None
    tls_key: Annotated[
        str | None,
        Setting(
            "The certificate's private key, as unencrypted PEM.",
            metavar="FILE",
            default="none",
        ),
    ] = None
    tls_client_ca: Annotated[
        str | None,
        Setting(
            "Accept only callers with a certificate signed by one of these CAs (mutual TLS), "
            "as PEM.",
            metavar="FILE",
            default="none (no client certificates)",
        ),
    ] = None
    tokens: Annotated[
        str | None,
        Setting(
            "Accept only callers with a token from this file; health checks need none.",
            choose="`darkroom-server token NAME` creates a token and its lines for the file. The "
            "server reads the file again when it changes. See docs/security.md.",
            metavar="FILE",
            default="none (no authentication)",
        ),
    ] = None
    trusted_proxies: Annotated[
        Annotated[str, Predicate(_are_networks)] | None,
        Setting(
            "Proxies whose `x-forwarded-for` names the caller's address. Without `--tokens`, "
            "limits are counted by address.",
            choose="The addresses of your proxies only: any other peer could invent an address.",
            metavar="NETWORK[,NETWORK]",
            default="none (the peer's own address counts)",
        ),
    ] = None
    max_jobs_per_address: Annotated[
        Annotated[int, Ge(1)] | None,
        Setting(
            "Without `--tokens`: most jobs of one address that are accepted and have not ended.",
            choose="For servers with several callers who have no tokens. A token has its own "
            "`max_jobs`.",
            metavar="N",
            default="no limit",
        ),
    ] = None
    insecure: Annotated[
        bool,
        Setting(
            "Listen on other addresses than loopback without TLS.",
            choose="For a mesh or a proxy that terminates TLS. The container image sets it; with "
            "a certificate it has no effect.",
        ),
    ] = False
