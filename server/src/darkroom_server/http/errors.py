"""Errors to HTTP statuses, in OpenAI's shape: the one module that knows both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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

STATUSES: dict[type[DarkroomError], int] = {
    InvalidRequest: 400,
    UnknownModel: 404,
    UnknownAdapter: 404,
    AdapterUnusable: 409,
    ModelUnusable: 409,
    ModelMemory: 409,
    UnknownRequest: 404,
    UploadNotFound: 404,
    RequestConflict: 422,
    Unauthenticated: 401,
    NotAllowed: 403,
    JobCancelled: 409,
    QueueFull: 503,
    QuotaExceeded: 429,
    NotReady: 503,
    ReaderStalled: 503,
    LedgerUnreachable: 503,
    TooLarge: 422,
    DeadlineExceeded: 504,
    DeadlineUnreachable: 504,
    GenerationFailed: 500,
}
"""A full queue is 503, so that proxies try another server; a quota is the caller's own: 429."""

DISCONNECTED = 499
"""For the log and the metrics: the caller disconnected before its answer."""

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's types of errors; any other status is "invalid_request_error" or "server_error"."""


class HttpError(Exception):
    """An error of HTTP itself, such as an unknown path; ``code`` is for programs."""

    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as it is sent; ``body`` becomes JSON."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def error_answer(error: DarkroomError | HttpError) -> ErrorAnswer:
    """The answer for ``error``; a type without a status is a KeyError.

    OpenAI's clients obey ``x-should-retry`` before any rule of their own.
    """
    if isinstance(error, HttpError):
        body = _body(error.status, error.code, str(error))
        return ErrorAnswer(error.status, body, {"x-should-retry": "false", **error.headers})
    status = STATUSES[type(error)]
    if error.reason is Reason.INVALID_REQUEST:  # Only the engine could find out.
        status = 400
    headers = {"x-should-retry": "false"}
    retry_after = error.retry_after if isinstance(error, Refused) else None
    if retry_after is not None:
        headers = {
            "x-should-retry": "true",
            "retry-after": str(max(1, math.ceil(retry_after))),
            "retry-after-ms": str(max(1, round(retry_after * 1000))),
        }
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = _body(status, error.reason.value.lower(), str(error), error.violations)
    return ErrorAnswer(status, body, headers)


def internal_error() -> ErrorAnswer:
    """The answer for what nobody foresaw: its text is for the log, not for the caller."""
    body = _body(500, Reason.INTERNAL.value.lower(), "internal error")
    return ErrorAnswer(500, body, {"x-should-retry": "false"})


def _body(
    status: int, code: str, message: str, violations: Sequence[Violation] = ()
) -> dict[str, Any]:
    listed = [{"field": v.field, "description": v.description} for v in violations]
    error: dict[str, Any] = {
        "message": message,
        "type": TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "param": listed[0]["field"] if listed else None,
        "code": code,
    }
    if listed:
        error["violations"] = listed
    return {"error": error}
