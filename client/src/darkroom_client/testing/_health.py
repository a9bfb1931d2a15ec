"""The health checks of the fake server."""

from collections.abc import Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from darkroom_client._types.status import ServerState
from darkroom_client.testing._jobs import JobRegistry
from darkroom_client.testing._statuses import drop

Response = health_pb2.HealthCheckResponse

SERVING = {
    "": (ServerState.READY,),
    "darkroom.v1.GenerationService": (ServerState.READY, ServerState.RECOVERING),
}
"""The states in which each health check answers SERVING."""


class Health(health_pb2_grpc.HealthServicer):
    """Answers from the state of a registry, and ends its watches when the registry closes."""

    def __init__(self, registry: JobRegistry) -> None:
        self._registry = registry

    def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        status = self._status(request.service)
        if status == Response.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return Response(status=status)

    def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        changed, sent = self._registry.changed, None
        context.add_callback(self._wake)
        while True:
            with changed:
                while self._status(request.service) == sent and self._open(context):
                    changed.wait()
                if self._registry.closing:
                    drop(context)
                if not context.is_active():
                    return
                sent = self._status(request.service)
            yield Response(status=sent)

    def _open(self, context: Any) -> bool:
        active: bool = context.is_active()
        return active and not self._registry.closing

    def _wake(self) -> None:
        with self._registry.changed:
            self._registry.changed.notify_all()

    def _status(self, service: str) -> Any:
        if service not in SERVING:
            return Response.SERVICE_UNKNOWN
        serving = self._registry.state in SERVING[service]
        return Response.SERVING if serving else Response.NOT_SERVING
