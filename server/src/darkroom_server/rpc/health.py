"""Health, by gRPC's own protocol; probes never use the engine."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from darkroom.v1 import generation_pb2
from darkroom_server.dispatch import State
from darkroom_server.rpc.context import Context

if TYPE_CHECKING:
    from collections.abc import Iterator

READY = ""
"""SERVING while jobs are accepted and an engine can run them: for load balancers."""

ACCEPTING = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
"""SERVING while jobs are accepted, even if they wait for an engine that restarts.

For clients that choose servers by health: they cut off running calls if it is NOT_SERVING.
"""

SERVING_IN = {READY: {State.READY}, ACCEPTING: {State.READY, State.RECOVERING}}

LEDGER = "darkroom.v1.Ledger"
"""SERVING while accepted jobs can be written down: for alerts, and for callers that submit jobs."""

LIVENESS = "liveness"
"""SERVING as long as the event loop runs: for liveness probes.

It answers until the port closes, some seconds into the drain.
"""


class Health(health_pb2_grpc.HealthServicer):
    """The health of each name; at first alive and not ready.

    A change never waits for a reader: it replaces the status and wakes the watchers, and each
    watcher sends the newest status when its own reader allows it. gRPC's own servicer writes to the
    watchers while it holds the lock that a change needs, so one watcher that reads nothing stops
    every change.
    """

    def __init__(self) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        self._statuses: dict[str, Any] = {LIVENESS: serving, LEDGER: serving}
        self._watchers: set[asyncio.Event] = set()
        self.set_state(State.LOADING)

    def set_state(self, state: State) -> None:
        """Publish ``state``; ``liveness`` stays SERVING, or a draining process would be killed."""
        self._set({name: state in states for name, states in SERVING_IN.items()})

    def set_ledger(self, reachable: bool) -> None:
        """Publish whether the ledger of accepted jobs can be written."""
        self._set({LEDGER: reachable})

    def _set(self, serving: Mapping[str, bool]) -> None:
        for name, serves in serving.items():
            self._statuses[name] = (
                health_pb2.HealthCheckResponse.SERVING
                if serves
                else health_pb2.HealthCheckResponse.NOT_SERVING
            )
        for changed in self._watchers:
            changed.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The status of one name; NOT_FOUND if it is unknown."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this name has no health status")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Any, context: Context) -> Any:
        """The status of every name; the types of its messages are not in the stubs yet."""
        messages: Any = health_pb2
        return messages.HealthListResponse(
            statuses={
                name: health_pb2.HealthCheckResponse(status=status)
                for name, status in self._statuses.items()
            }
        )

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status of one name now, and whenever it differs from the last one sent."""
        sent = None
        with self._watcher() as changed:
            while True:
                changed.clear()
                status = self._statuses.get(
                    request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                )
                if status != sent:
                    sent = status
                    yield health_pb2.HealthCheckResponse(status=status)
                else:
                    await changed.wait()

    @contextmanager
    def _watcher(self) -> "Iterator[asyncio.Event]":
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            yield changed
        finally:
            self._watchers.discard(changed)
