"""The retry policy of unary calls: which methods gRPC retries, and when (its service config)."""

from dataclasses import replace

from darkroom_client._protocol.rpc_errors import RETRIED
from darkroom_client._settings import Settings
from darkroom_client._types.connection import Retry

HEALTH_SERVICE = "darkroom.v1.GenerationService"
"""The name whose health check says whether a server accepts jobs."""

JOB_STARTING_METHODS = (
    ("darkroom.v1.GenerationService", "Generate"),
    ("darkroom.v1.GenerationService", "SubmitGeneration"),
)
OTHER_METHODS = (
    ("darkroom.v1.GenerationService", "CancelGeneration"),
    ("darkroom.v1.GenerationService", "GetGeneration"),
    ("darkroom.v1.GenerationService", "ListGenerations"),
    ("darkroom.v1.GenerationService", "EstimateGeneration"),
    ("darkroom.v1.ModelService", "ListModels"),
    ("darkroom.v1.ModelService", "GetModel"),
    ("darkroom.v1.ServerService", "GetStatus"),
)
"""Unary methods that gRPC retries: each is in one of the two tables.

No streams: ``GenerationSession`` retries those, as it knows what has arrived. (With grpcio 1.85,
gRPC's own retries of a stream hung until its deadline if the server was shutting down.)"""

Methods = tuple[tuple[str, str], ...]


def service_config(settings: Settings, *, checked: bool) -> dict[str, object]:
    """The service config of gRPC: load balancing, health checks and retries."""
    retry = settings.retry
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if checked:
        # No retries here: gRPC would use them all up while no server is healthy. The further
        # tries of a call that fails go over the plain channel.
        config["healthCheckConfig"] = {"serviceName": HEALTH_SERVICE}
    elif retry.attempts > 1:
        # The first try of a call that starts a job went over the checked channel.
        later = replace(
            retry,
            attempts=retry.attempts - 1,
            initial_backoff=min(retry.initial_backoff * retry.multiplier, retry.max_backoff),
        )
        kinds = [(OTHER_METHODS, retry), (JOB_STARTING_METHODS, later)]
        config["methodConfig"] = [_method_config(*kind) for kind in kinds if kind[1].attempts > 1]
        # Retries stop after 50 more failures than successes, to spare servers that are down.
        config["retryThrottling"] = {"maxTokens": 100, "tokenRatio": 0.5}
    return config


def _method_config(methods: Methods, retry: Retry) -> dict[str, object]:
    policy = {
        "maxAttempts": retry.attempts,
        "initialBackoff": f"{retry.initial_backoff:.9f}s",
        "maxBackoff": f"{retry.max_backoff:.9f}s",
        "backoffMultiplier": retry.multiplier,
        "retryableStatusCodes": [code.name for code in RETRIED],
    }
    names = [{"service": service, "method": method} for service, method in methods]
    return {"name": names, "retryPolicy": policy}
