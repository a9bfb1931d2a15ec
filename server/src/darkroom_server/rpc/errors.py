"""Domain errors to gRPC statuses, with details: the one module that knows both."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from darkroom_server.core.errors import (
    AdapterUnusable,
    DarkroomError,
    DeadlineExceeded,
    DeadlineUnreachable,
    GenerationFailed,
    InvalidRequest,
    JobCancelled,
    LedgerUnreachable,
    ModelMemory,
    ModelUnusable,
    NotAllowed,
    NotReady,
    QueueFull,
    QuotaExceeded,
    ReaderStalled,
    Reason,
    Refused,
    RequestConflict,
    TooLarge,
    Unauthenticated,
    UnknownAdapter,
    UnknownModel,
    UnknownRequest,
    UploadNotFound,
    Violation,
)

DOMAIN = "darkroom"
PUSHBACK = "grpc-retry-pushback-ms"
"""Clients built on gRPC's C-core obey this trailer, and ignore ``RetryInfo``."""

MAX_MESSAGE = 1000
"""Characters; a status travels in trailers, of which 8 KiB pass everywhere."""

MAX_VIOLATIONS_BYTES = 4096
"""Of ``BadRequest``, for the same reason."""

NOT_TO_BE_RETRIED = (code_pb2.RESOURCE_EXHAUSTED, code_pb2.CANCELLED)
"""Unless after a delay; gRPC itself ends calls with these codes too, without a word on retries."""

CODES: dict[type[DarkroomError], int] = {
    InvalidRequest: code_pb2.INVALID_ARGUMENT,
    UnknownModel: code_pb2.NOT_FOUND,
    UnknownAdapter: code_pb2.NOT_FOUND,
    AdapterUnusable: code_pb2.FAILED_PRECONDITION,
    ModelUnusable: code_pb2.FAILED_PRECONDITION,
    ModelMemory: code_pb2.FAILED_PRECONDITION,
    UnknownRequest: code_pb2.NOT_FOUND,
    UploadNotFound: code_pb2.FAILED_PRECONDITION,
    RequestConflict: code_pb2.ALREADY_EXISTS,
    Unauthenticated: code_pb2.UNAUTHENTICATED,
    NotAllowed: code_pb2.PERMISSION_DENIED,
    JobCancelled: code_pb2.CANCELLED,
    QueueFull: code_pb2.RESOURCE_EXHAUSTED,
    QuotaExceeded: code_pb2.RESOURCE_EXHAUSTED,
    NotReady: code_pb2.UNAVAILABLE,
    ReaderStalled: code_pb2.UNAVAILABLE,
    LedgerUnreachable: code_pb2.UNAVAILABLE,
    TooLarge: code_pb2.RESOURCE_EXHAUSTED,
    DeadlineExceeded: code_pb2.DEADLINE_EXCEEDED,
    DeadlineUnreachable: code_pb2.DEADLINE_EXCEEDED,
    GenerationFailed: code_pb2.INTERNAL,
}

CODES_OF_REASONS: dict[Reason, int] = {
    Reason.INVALID_REQUEST: code_pb2.INVALID_ARGUMENT,
    Reason.OUT_OF_MEMORY: code_pb2.RESOURCE_EXHAUSTED,
    Reason.ADAPTER_UNUSABLE: code_pb2.FAILED_PRECONDITION,
    Reason.MODEL_GONE: code_pb2.FAILED_PRECONDITION,
    Reason.MODEL_UNUSABLE: code_pb2.FAILED_PRECONDITION,
    Reason.MODEL_MEMORY: code_pb2.FAILED_PRECONDITION,
}
"""Where the reason says more than the type."""


@dataclass(frozen=True, slots=True)
class ErrorStatus(grpc.Status):
    """A status with its trailers, as ``abort_with_status`` takes it."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def status_of(error: DarkroomError) -> ErrorStatus:
    """The status for ``error``; a type without a code is a KeyError."""
    message = str(error)
    if len(message) > MAX_MESSAGE:
        message = message[: MAX_MESSAGE - 1] + "…"
    code = CODES_OF_REASONS.get(error.reason, CODES[type(error)])
    return _status(code, message, error.reason, error.metadata, _details(error))


def internal_error() -> ErrorStatus:
    """The status for what nobody foresaw: its text is for the log, not for the caller."""
    return _status(code_pb2.INTERNAL, "internal error", Reason.INTERNAL, {}, [])


def _status(
    code: int, message: str, reason: Reason, metadata: dict[str, str], details: list[Message]
) -> ErrorStatus:
    info = error_details_pb2.ErrorInfo(reason=reason.value, domain=DOMAIN, metadata=metadata)
    rich = status_pb2.Status(code=code, message=message)
    for detail in (info, *details):
        rich.details.add().Pack(detail)
    status = rpc_status.to_status(rich)
    trailers = [*status.trailing_metadata]
    for detail in details:
        if isinstance(detail, error_details_pb2.RetryInfo):
            trailers.append((PUSHBACK, str(detail.retry_delay.ToMilliseconds())))
    if code in NOT_TO_BE_RETRIED and len(trailers) == 1:
        trailers.append((PUSHBACK, "-1"))
    return ErrorStatus(status.code, status.details, tuple(trailers))


def _details(error: DarkroomError) -> list[Message]:
    match error:
        case InvalidRequest() | GenerationFailed() if error.violations:
            return [_bad_request(error.violations)]
        case UnknownModel(model=model):
            return [
                error_details_pb2.ResourceInfo(
                    resource_type="darkroom.v1.Model",
                    resource_name=model,
                    description="this server does not hold it",
                )
            ]
        case UnknownAdapter(adapter=adapter):
            return [
                error_details_pb2.ResourceInfo(
                    resource_type="darkroom.v1.Adapter",
                    resource_name=adapter,
                    description="this server does not offer it",
                )
            ]
        case UnknownRequest(request_id=request_id) | RequestConflict(request_id=request_id):
            return [
                error_details_pb2.ResourceInfo(
                    resource_type="darkroom.v1.Generation", resource_name=request_id
                )
            ]
        case QuotaExceeded():
            quota = error_details_pb2.QuotaFailure()
            quota.violations.add(subject=error.subject, description=str(error))
            return [quota]
        case Refused(retry_after=float(seconds)):
            delay = Duration()
            delay.FromMilliseconds(max(1, round(seconds * 1000)))
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
    return []


def _bad_request(violations: Iterable[Violation]) -> Any:
    bad = error_details_pb2.BadRequest()
    for violation in violations:
        bad.field_violations.add(field=violation.field, description=violation.description)
        if bad.ByteSize() > MAX_VIOLATIONS_BYTES:
            del bad.field_violations[-1]
            break
    return bad
