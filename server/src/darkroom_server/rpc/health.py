"""Health, by gRPC's own protocol; probes never touch the engine."""

from grpc_health.v1 import health, health_pb2

from darkroom.v1 import generation_pb2
from darkroom_server.dispatch import State

READY = ""
"""SERVING while jobs are accepted and an engine can run them: for load balancers."""

ACCEPTING = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
"""SERVING while jobs are accepted, even if they wait for an engine that restarts.

For clients that choose servers by health: they cut off running calls if it is NOT_SERVING.
"""

SERVING_IN = {READY: {State.READY}, ACCEPTING: {State.READY, State.RECOVERING}}

LIVENESS = "liveness"
"""SERVING as long as the event loop runs: for liveness probes.

It answers until the port closes, some seconds into the drain.
"""


class Health:
    """The server's health; at first alive and not ready.

    Each name is set by hand: the servicer's ``enter_graceful_shutdown`` would also change
    ``liveness``, and the draining process would be killed.
    """

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()

    async def alive(self) -> None:
        """Set alive and not ready, before the port opens: the servicer starts as ready."""
        await self.set_state(State.LOADING)
        await self.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)

    async def set_state(self, state: State) -> None:
        """Publish ``state``."""
        status = health_pb2.HealthCheckResponse
        for name, states in SERVING_IN.items():
            served = status.SERVING if state in states else status.NOT_SERVING
            await self.servicer.set(name, served)
