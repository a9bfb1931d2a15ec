"""Convert the client's errors to the gRPC statuses of a Darkroom server."""

from typing import NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from darkroom_client import _errors as errors
from darkroom_client._errors import DarkroomError

PUSHBACK = "grpc-retry-pushback-ms"

SENT: dict[type[DarkroomError], tuple[int, str]] = {
    errors.UploadNotFound: (code_pb2.FAILED_PRECONDITION, "UPLOAD_NOT_FOUND"),
    errors.InvalidRequest: (code_pb2.INVALID_ARGUMENT, "INVALID_REQUEST"),
    errors.ModelNotFound: (code_pb2.NOT_FOUND, "UNKNOWN_MODEL"),
    errors.ModelUnusable: (code_pb2.FAILED_PRECONDITION, "MODEL_UNUSABLE"),
    errors.ModelDoesNotFit: (code_pb2.FAILED_PRECONDITION, "MODEL_MEMORY"),
    errors.AdapterNotFound: (code_pb2.NOT_FOUND, "UNKNOWN_ADAPTER"),
    errors.AdapterUnusable: (code_pb2.FAILED_PRECONDITION, "ADAPTER_UNUSABLE"),
    errors.UnknownRequest: (code_pb2.NOT_FOUND, "UNKNOWN_REQUEST"),
    errors.TooLarge: (code_pb2.RESOURCE_EXHAUSTED, "DOES_NOT_FIT"),
    errors.ReplyTooLarge: (code_pb2.INVALID_ARGUMENT, "REPLY_TOO_LARGE"),
    errors.Overloaded: (code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.QuotaExceeded: (code_pb2.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    errors.Unavailable: (code_pb2.UNAVAILABLE, "DRAINING"),
    errors.DeadlineExceeded: (code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"),
    errors.DeadlineUnreachable: (code_pb2.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE"),
    errors.Unauthenticated: (code_pb2.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionDenied: (code_pb2.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.GenerationFailed: (code_pb2.INTERNAL, "ENGINE_FAILED"),
    errors.Cancelled: (code_pb2.CANCELLED, "CANCELLED"),
    errors.ServerError: (code_pb2.INTERNAL, "INTERNAL"),
}
"""The status code of each error, and its reason if the error has none."""


def sent_as(error: DarkroomError) -> tuple[int, str]:
    """The status code and the reason of ``error``; raises ``TypeError`` if no server sends it.

    A subclass is sent as the client's class that it derives from.
    """
    if error.reason == "REQUEST_CONFLICT":
        return code_pb2.ALREADY_EXISTS, error.reason
    for kind in type(error).__mro__:
        # The client itself finds a TLS problem: no server sends it.
        if kind in SENT and not isinstance(error, errors.TLSError):
            return SENT[kind]
    names = ", ".join(kind.__name__ for kind in SENT)
    raise TypeError(f"no server sends {type(error).__name__}; it may be one of {names}")


def abort(context: grpc.ServicerContext, error: DarkroomError) -> NoReturn:
    """End the call with ``error``, as a Darkroom server does."""
    code, reason = sent_as(error)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason or reason, domain="darkroom", metadata=error.metadata
    )
    status = status_pb2.Status(code=code, message=str(error))
    details = _details(error)
    for detail in (info, *details):
        status.details.add().Pack(detail)
    plain = rpc_status.to_status(status)
    trailers = [*(plain.trailing_metadata or ())]
    waits = [each for each in details if isinstance(each, error_details_pb2.RetryInfo)]
    if waits:
        trailers.append((PUSHBACK, str(waits[0].retry_delay.ToMilliseconds())))
    elif code in (code_pb2.RESOURCE_EXHAUSTED, code_pb2.CANCELLED):
        trailers.append((PUSHBACK, "-1"))
    context.abort_with_status(_Status(plain.code, plain.details, tuple(trailers)))
    raise AssertionError("abort raises")


def drop(context: grpc.ServicerContext) -> NoReturn:
    """End the call like a broken connection."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was dropped")
    raise AssertionError("abort raises")


class _Status(grpc.Status):
    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        trailing_metadata: tuple[tuple[str, str | bytes], ...],
    ) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata


def _details(error: DarkroomError) -> list[Message]:
    if isinstance(error, errors.QuotaExceeded):
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject="caller", description=str(error))
        return [quota]
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        return [bad]
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        return [error_details_pb2.RetryInfo(retry_delay=delay)]
    return []
