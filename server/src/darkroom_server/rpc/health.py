"""Health, by gRPC's own protocol; probes never touch the engine."""

from grpc_health.v1 import health, health_pb2

from darkroom.v1 import generation_pb2

READINESS = ("", generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name)
"""SERVING while jobs are accepted and an engine can draw them."""

LIVENESS = "liveness"
"""SERVING as long as the process turns: an orchestrator kills on this one.

It can be asked until the port is closed, some seconds into the drain.
"""


class Health:
    """What the server says of its health. Until told otherwise it is alive and not ready.

    The names are set by hand: the servicer's ``enter_graceful_shutdown`` would turn ``liveness``
    too, and the draining process would be killed.
    """

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()

    async def alive(self) -> None:
        """Before the port opens: alive, and not ready. The servicer starts out as ready."""
        await self.ready(False)
        await self.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)

    async def ready(self, ready: bool) -> None:
        """New requests are accepted from now on, or no longer."""
        status = health_pb2.HealthCheckResponse
        for service in READINESS:
            await self.servicer.set(service, status.SERVING if ready else status.NOT_SERVING)
