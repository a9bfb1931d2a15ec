"""One ``Generate`` call, prepared: all that both clients share before and after the wire."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import grpc

from darkroom.v1 import generation_pb2
from darkroom_client._errors import Cancelled, DarkroomError
from darkroom_client._replay import ReplayRecord
from darkroom_client._request import GenerationRequest
from darkroom_client._rpc_errors import from_rpc_error
from darkroom_client._settings import Settings
from darkroom_client._wire.requests import encode_request, settled


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """The message of one call, and what goes along with it."""

    message: generation_pb2.GenerateRequest
    request_id: str
    address: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]

    @classmethod
    def prepare(
        cls,
        settings: Settings,
        request: GenerationRequest,
        timeout: float | None,
        metadata: Mapping[str, str] | None,
    ) -> "GenerateCall":
        """Fix the seed and the id before the first try, so that a retry draws the same picture.

        Raises ``InvalidRequest``, ``TypeError`` and ``ValueError`` for what cannot be sent.
        """
        message = encode_request(settled(request))
        return cls(
            message=message,
            request_id=message.request_id,
            address=settings.target,
            timeout=settings.deadline(timeout),
            metadata=settings.metadata(metadata),
        )

    def failure(self, error: grpc.RpcError) -> DarkroomError:
        """What ``error`` means to the caller."""
        return from_rpc_error(
            error, address=self.address, timeout=self.timeout, request_id=self.request_id
        )

    def cancelled(self) -> DarkroomError:
        """What the caller learns when the connection was closed under the call."""
        return Cancelled(
            "the call was cancelled: the client was closed while it ran",
            code="CANCELLED",
            request_id=self.request_id,
        )


def replayed(record: ReplayRecord) -> GenerationRequest:
    """The request of ``record``, to be sent under an id of its own."""
    return replace(record.request, request_id=None)
