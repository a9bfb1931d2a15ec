"""Health, by gRPC's own protocol; probes never touch the engine."""

from grpc_health.v1 import health, health_pb2

from darkroom.v1 import generation_pb2
from darkroom_server.dispatch import State

READY = ""
"""SERVING while jobs are accepted and an engine can draw them: a load balancer asks this one."""

ACCEPTING = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
"""SERVING while jobs are accepted, though they may have to wait for an engine that comes back.

A client that picks servers itself asks this one: it would cut off its calls where it is not so.
"""

SERVING_IN = {READY: {State.READY}, ACCEPTING: {State.READY, State.RECOVERING}}

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
        await self.tell(State.LOADING)
        await self.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)

    async def tell(self, state: State) -> None:
        """The server is in ``state`` from now on."""
        status = health_pb2.HealthCheckResponse
        for name, states in SERVING_IN.items():
            served = status.SERVING if state in states else status.NOT_SERVING
            await self.servicer.set(name, served)
