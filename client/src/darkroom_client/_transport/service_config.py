"""The service config of gRPC: load balancing and health checks, and no retries.

``_protocol.retries`` makes the retries of all calls: gRPC stops after five tries, and a pushback of
the server that is longer than the deadline ends its call. A call that gRPC never sent is still
repeated by gRPC itself ("transparent retry").
"""

HEALTH_SERVICE = "darkroom.v1.GenerationService"
"""The name whose health check says whether a server accepts jobs."""


def service_config(*, checked: bool) -> dict[str, object]:
    """The service config; ``checked``: only servers whose health says that they accept jobs."""
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if checked:
        config["healthCheckConfig"] = {"serviceName": HEALTH_SERVICE}
    return config
