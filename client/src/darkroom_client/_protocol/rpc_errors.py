"""The one module that knows both gRPC's status codes and this client's errors."""

from collections.abc import Iterator
from typing import TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import (
    BadRequest,
    ErrorInfo,
    QuotaFailure,
    RetryInfo,
)
from grpc_status import rpc_status

from darkroom_client import _errors as errors
from darkroom_client._errors import DarkroomError, Violation

DOMAIN = "darkroom"

REASONS: dict[str, type[DarkroomError]] = {
    "INVALID_REQUEST": errors.InvalidRequest,
    "UNKNOWN_MODEL": errors.ModelNotFound,
    "UNKNOWN_REQUEST": errors.UnknownRequest,
    "REQUEST_CONFLICT": errors.InvalidRequest,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "REPLY_TOO_LARGE": errors.ReplyTooLarge,
    "QUEUE_FULL": errors.Overloaded,
    "QUOTA_EXCEEDED": errors.QuotaExceeded,
    "MODEL_LOADING": errors.Unavailable,
    "DRAINING": errors.Unavailable,
    "DOES_NOT_FIT": errors.TooLarge,
    "DEADLINE_EXPIRED": errors.DeadlineExceeded,
    "DEADLINE_UNREACHABLE": errors.DeadlineExceeded,
    "CANCELLED": errors.Cancelled,
    "OUT_OF_MEMORY": errors.GenerationFailed,
    "NON_FINITE": errors.GenerationFailed,
    "SCHEDULER_FAILED": errors.GenerationFailed,
    "ENGINE_FAILED": errors.GenerationFailed,
    "ENGINE_CRASHED": errors.GenerationFailed,
    "INTERNAL": errors.ServerError,
}
"""What each reason of the server becomes; a reason that is newer goes by its status code."""

CODES: dict[grpc.StatusCode, type[DarkroomError]] = {
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNKNOWN: errors.ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.InvalidRequest,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: errors.InvalidRequest,
    grpc.StatusCode.ABORTED: errors.GenerationFailed,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unsupported,
    grpc.StatusCode.INTERNAL: errors.ServerError,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DATA_LOSS: errors.ServerError,
}

RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""What another try may mend. A server that closes its port drops what arrives at that moment, as
CANCELLED; a job that somebody cancelled is CANCELLED too, but with a trailer that forbids retries.
"""

# gRPC's own words, which no detail message accompanies, from either end of the connection.
_OVERSIZE = "message larger than max"
_NO_SERVER = "connections to all backends failing"

_PUSHBACK = "grpc-retry-pushback-ms"
_REQUEST_ID = "darkroom-request-id"

M = TypeVar("M", bound=Message)


def from_rpc_error(
    error: grpc.RpcError, *, address: str, timeout: float | None, request_id: str | None = None
) -> DarkroomError:
    """What ``error`` means to the caller of the server at ``address``.

    Where the call named no request, the id is the one that the server gave it, for its logs.
    """
    code, text = error.code(), error.details() or ""
    details = _Details(error)
    info = details.first(ErrorInfo)
    reason = info.reason if info is not None and info.domain == DOMAIN else ""
    retry = details.first(RetryInfo)
    bad = details.first(BadRequest)
    kind = REASONS.get(reason) or CODES.get(code, DarkroomError)
    if code is grpc.StatusCode.UNAVAILABLE:
        # Nothing was begun, whatever the reason: an engine that is gone fails the jobs it had,
        # and turns new ones away.
        kind = errors.Unavailable
    if not reason:
        kind, text = _without_reason(kind, code, text, address, timeout)
        if details.first(QuotaFailure) is not None:
            kind = errors.QuotaExceeded
    return kind(
        text or f"the server at {address} answered {code.name}",
        code=code.name,
        reason=reason,
        request_id=request_id or _trailer(error, _REQUEST_ID),
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None else None,
        violations=tuple(
            Violation(field=v.field, description=v.description)
            for v in (bad.field_violations if bad is not None else ())
        ),
        metadata=dict(info.metadata) if info is not None else None,
    )


def _without_reason(
    kind: type[DarkroomError],
    code: grpc.StatusCode,
    text: str,
    address: str,
    timeout: float | None,
) -> tuple[type[DarkroomError], str]:
    """Errors that gRPC or a proxy made, not Darkroom: say what the caller should look at."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _OVERSIZE in text:
        return errors.ReplyTooLarge, (
            f"a message is over the size limit ({text}): ask for fewer or smaller images, "
            "or raise max_reply_bytes"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return kind, unreachable(address, text)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        limit = f" within {timeout:g} s" if timeout is not None else " in time"
        return kind, (
            f"no answer from {address}{limit}: is it ready, and not loading (its status says)? "
            "Then pass a longer timeout, or ask for fewer steps or images"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return kind, (
            f"the server at {address} does not offer this call ({text}): is it Darkroom, and no "
            "older than this client?"
        )
    return kind, text


def was_sent(error: grpc.RpcError) -> bool:
    """False where gRPC knew of no server that it could have sent the call to."""
    return error.code() is not grpc.StatusCode.UNAVAILABLE or _NO_SERVER not in (
        error.details() or ""
    )


def is_bare(error: DarkroomError, kind: type[DarkroomError]) -> bool:
    """Whether it is a ``kind`` without a reason: gRPC's own words, and no server's."""
    return isinstance(error, kind) and not error.reason


def may_retry(error: grpc.RpcError) -> bool:
    """Whether gRPC itself would try again after ``error``."""
    trailers = cast(grpc.Call, error).trailing_metadata() or ()
    forbidden = any(key == _PUSHBACK and str(value).startswith("-") for key, value in trailers)
    return error.code() in RETRIED and not forbidden


def unreachable(address: str, cause: str) -> str:
    """A sentence that names the address that does not answer, and what to look at."""
    return (
        f"no Darkroom server answers at {address} ({cause}): is it running (darkroom-server "
        "serve), is this its address and port (Client(...), DARKROOM_TARGET), and do both ends "
        "agree on TLS (tls=TLS(...), DARKROOM_CA)?"
    )


def _trailer(error: grpc.RpcError, name: str) -> str | None:
    trailers = cast(grpc.Call, error).trailing_metadata() or ()
    return next((str(value) for key, value in trailers if key == name), None)


class _Details:
    """The typed details that came with an error, none where they are missing or garbled."""

    def __init__(self, error: grpc.RpcError) -> None:
        try:
            self._status = rpc_status.from_call(cast(grpc.Call, error))
        except (ValueError, DecodeError):
            # A proxy changed code, text or details on the way; what it says now is what holds.
            self._status = None

    def first(self, kind: type[M]) -> M | None:
        """The first detail of type ``kind``."""
        return next(self._all(kind), None)

    def _all(self, kind: type[M]) -> Iterator[M]:
        for packed in self._status.details if self._status is not None else ():
            message = kind()
            try:
                matches = packed.Unpack(message)
            except DecodeError:
                continue
            if matches:
                yield message
