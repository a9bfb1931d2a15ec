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
    "MODEL_UNUSABLE": errors.ModelUnusable,
    "MODEL_MEMORY": errors.ModelDoesNotFit,
    "UNKNOWN_ADAPTER": errors.AdapterNotFound,
    "ADAPTER_UNUSABLE": errors.AdapterUnusable,
    "UNKNOWN_REQUEST": errors.UnknownRequest,
    "REQUEST_CONFLICT": errors.InvalidRequest,
    "UPLOAD_NOT_FOUND": errors.UploadNotFound,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "REPLY_TOO_LARGE": errors.ReplyTooLarge,
    "QUEUE_FULL": errors.Overloaded,
    "QUOTA_EXCEEDED": errors.QuotaExceeded,
    "MODEL_LOADING": errors.Unavailable,
    "DRAINING": errors.Unavailable,
    "READER_STALLED": errors.Unavailable,
    "LEDGER_UNREACHABLE": errors.Unavailable,
    "DOES_NOT_FIT": errors.TooLarge,
    "DEADLINE_EXPIRED": errors.DeadlineExceeded,
    "DEADLINE_UNREACHABLE": errors.DeadlineUnreachable,
    "CANCELLED": errors.Cancelled,
    "OUT_OF_MEMORY": errors.GenerationFailed,
    "NON_FINITE": errors.GenerationFailed,
    "SCHEDULER_FAILED": errors.GenerationFailed,
    "ENGINE_FAILED": errors.GenerationFailed,
    "ENGINE_CRASHED": errors.GenerationFailed,
    "MODEL_GONE": errors.GenerationFailed,
    "INTERNAL": errors.ServerError,
}
"""The error class of each reason of the server; a newer reason goes by its status code."""

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
"""Statuses that are worth a retry. A server that closes its port ends calls that arrive at that
moment with CANCELLED. A job that was cancelled is CANCELLED, too, but has a trailer that forbids
retries."""

# gRPC's own error texts, from either end of the connection; they have no details.
_OVERSIZE = "message larger than max"
_NO_SERVER = "connections to all backends failing"

_PUSHBACK = "grpc-retry-pushback-ms"
_REQUEST_ID = "darkroom-request-id"

M = TypeVar("M", bound=Message)


def from_rpc_error(
    error: grpc.RpcError, *, address: str, timeout: float | None, request_id: str | None = None
) -> DarkroomError:
    """Convert ``error`` of a call to the server at ``address``.

    If the call had no request id, it gets the id that the server uses in its logs.
    """
    code, text = error.code(), error.details() or ""
    details = _Details(error)
    info = details.first(ErrorInfo)
    reason = info.reason if info is not None and info.domain == DOMAIN else ""
    retry = details.first(RetryInfo)
    bad = details.first(BadRequest)
    kind = REASONS.get(reason) or CODES.get(code, DarkroomError)
    if code is grpc.StatusCode.UNAVAILABLE:
        # No job began, whatever the reason: a lost engine fails the jobs that it had,
        # and rejects new ones.
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
    """Describe an error of gRPC or of a proxy, with what the caller should check."""
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
            f"the server at {address} does not offer this call ({text}): is it Darkroom, and not "
            "older than this client?"
        )
    return kind, text


def was_sent(error: grpc.RpcError) -> bool:
    """False if gRPC knew no server to send the call to."""
    return error.code() is not grpc.StatusCode.UNAVAILABLE or found_server(error.details() or "")


def found_server(details: str) -> bool:
    """Whether gRPC knew a server for a call that ended with UNAVAILABLE and ``details``."""
    return _NO_SERVER not in details


def is_bare(error: DarkroomError, kind: type[DarkroomError]) -> bool:
    """Whether it is a ``kind`` without a reason: from gRPC, not from a server."""
    return isinstance(error, kind) and not error.reason


def may_retry(error: grpc.RpcError) -> bool:
    """Whether a further try may succeed after ``error``, and the server does not forbid it."""
    trailers = cast(grpc.Call, error).trailing_metadata() or ()
    forbidden = any(key == _PUSHBACK and str(value).startswith("-") for key, value in trailers)
    return error.code() in RETRIED and not forbidden


def unreachable(address: str, cause: str) -> str:
    """A sentence with the address that does not answer, and what to check."""
    return (
        f"no Darkroom server answers at {address} ({cause}): is it running (darkroom-server "
        "serve), is this its address and port (Client(...), DARKROOM_TARGET), and do both ends "
        "agree on TLS (tls=TLS(...), DARKROOM_CA)?"
    )


def _trailer(error: grpc.RpcError, name: str) -> str | None:
    trailers = cast(grpc.Call, error).trailing_metadata() or ()
    return next((str(value) for key, value in trailers if key == name), None)


class _Details:
    """The typed details of an error; none if they are missing or broken."""

    def __init__(self, error: grpc.RpcError) -> None:
        try:
            self._status = rpc_status.from_call(cast(grpc.Call, error))
        except (ValueError, DecodeError):
            # A proxy changed the code, text or details: use the code and text as they are.
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
