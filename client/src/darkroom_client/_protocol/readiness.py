"""The state of a wait for a ready server, shared by both clients."""

import math
import time

import grpc
from grpc_health.v1 import health_pb2

from darkroom_client._errors import DarkroomError, Unavailable
from darkroom_client._protocol.rpc_errors import from_rpc_error, unreachable

REQUEST = health_pb2.HealthCheckRequest(service="")

PAUSE = 0.25
"""Seconds between two health checks of a server that ends them at once."""


class Readiness:
    """One wait: its deadline, and the last state of the server."""

    def __init__(self, address: str, timeout: float | None) -> None:
        self._address = address
        self._timeout = timeout
        self._ends_at = math.inf if timeout is None else time.monotonic() + timeout
        self._status: int | None = None
        self._cause = "nothing accepts connections there"

    @property
    def remaining(self) -> float | None:
        """The remaining seconds, at least 0; None if there is no limit."""
        remaining = self._ends_at - time.monotonic()
        return None if math.isinf(remaining) else max(remaining, 0.0)

    @property
    def pause(self) -> float:
        """Seconds to wait before the next health check."""
        return PAUSE if self.remaining is None else min(PAUSE, self.remaining)

    def saw(self, response: health_pb2.HealthCheckResponse) -> bool:
        """Record the server's health; true if it is ready."""
        self._status = response.status
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def failed(self, error: grpc.RpcError) -> None:
        """Record a failed health check; raises if a further one would fail, or the time is up."""
        code = error.code()
        if code is grpc.StatusCode.UNAVAILABLE:
            self._status = None
            self._cause = error.details() or "UNAVAILABLE"
        elif code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise from_rpc_error(error, address=self._address, timeout=self._timeout) from error
        self.check()

    def check(self) -> None:
        """Raise ``Unavailable`` if the time is up."""
        if self.remaining == 0.0:
            raise self._late()

    def _late(self) -> DarkroomError:
        waited = f"after {self._timeout:g} s"
        if self._status is None:
            message = f"{waited}: {unreachable(self._address, self._cause)}"
        else:
            message = (
                f"the server at {self._address} answers, and is still not ready {waited}: its "
                "model is loading (its log shows the progress), or it is shutting down"
            )
        return Unavailable(message, code="UNAVAILABLE")
