"""One call that asks for images: its id, its moment, and what makes it the same as another."""

import hashlib
import time

from darkroom.v1 import generation_pb2
from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.rpc.request_id import REQUEST_ID, RULE
from darkroom_server.rpc.validation import request_id_of


class IncomingRequest:
    """A request as it arrived.

    ``arrived`` in ``time.monotonic`` seconds. ``id`` is the request's own, or the call's where it
    has none. ``known``: the caller knows it before the end, and can come back with it.
    """

    def __init__(
        self,
        request: generation_pb2.GenerateRequest,
        preview: generation_pb2.PreviewOptions | None,
        *,
        known: bool,
    ) -> None:
        self.request = request
        self.known = known
        self.preview = preview
        self.arrived = time.monotonic()
        self.id = request_id_of(request)

    @property
    def keep(self) -> bool:
        """The job is to live on for a while without a waiter."""
        return self.request.on_disconnect == generation_pb2.ON_DISCONNECT_KEEP

    def fingerprint(self) -> bytes:
        """A digest of all that is asked for: neither the id nor what a disconnect means are of it.

        Fields count as they were sent: an unset one equals an unset one, and nothing else.
        """
        body = generation_pb2.GenerateRequest()
        body.CopyFrom(self.request)
        body.ClearField("request_id")
        body.ClearField("on_disconnect")
        return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def checked_id(request_id: str) -> str:
    """The id of a job that was asked for before; raises ``InvalidRequest``."""
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest([Violation("request_id", f"{RULE}, and not empty")])
    return request_id


def deadline_after(seconds: float | None) -> float | None:
    """The moment so many seconds from now, in ``time.monotonic`` seconds; None for never."""
    return None if seconds is None else time.monotonic() + seconds


def time_limit(request: generation_pb2.SubmitGenerationRequest) -> float | None:
    """The time limit in seconds, None without one; raises ``InvalidRequest``."""
    if not request.HasField("time_limit"):
        return None
    seconds = request.time_limit.seconds + request.time_limit.nanos / 1e9
    if not 0 < seconds < MAX_TIME_LIMIT_SECONDS:
        raise InvalidRequest([Violation("time_limit", "must be more than nothing, at most a year")])
    return seconds


MAX_TIME_LIMIT_SECONDS = 366 * 86400.0
