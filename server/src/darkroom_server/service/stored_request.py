"""An accepted request with what is needed to run it again, wherever and by whichever server."""

from dataclasses import dataclass
from typing import Protocol

from darkroom_server.service.request import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRequest:
    """``request`` as the caller sent it, its pictures by their digests only.

    ``seed``: that of its first image, also if the request has none. ``model`` and
    ``model_revision``: those that accepted it. ``address`` and ``priority``: the caller's.
    """

    request: GenerationRequest
    seed: int
    model: str
    model_revision: str
    address: str = ""
    priority: int = 0
    trace_id: str = ""


class RequestCodec(Protocol):
    """Stored requests as bytes that later versions of the server can read."""

    def encode(self, stored: StoredRequest) -> bytes:
        """``stored`` as bytes."""

    def decode(self, data: bytes) -> StoredRequest:
        """What ``encode`` made the bytes of; raises ``ValueError`` for those of a newer version."""
