"""Every error that a caller can meet, as a small closed tree.

DarkroomError
├── InvalidRequest        mend the request
├── UnknownModel          name another model
├── UnknownRequest        no job of that id is known, or known any more
├── RequestConflict       that id is taken by another request of the same caller
├── Unauthenticated       bring a valid token
├── NotAllowed            this caller may not make this call
├── Refused               the request is fine, the moment or the machine is not
│   ├── QueueFull         try again after `retry_after`
│   ├── QuotaExceeded     this caller has its share; try again after `retry_after`
│   ├── NotReady          try again after `retry_after`
│   ├── ReaderStalled     the stream was not read; begin another one
│   └── TooLarge          never fits this machine
├── DeadlineExceeded      give more time
├── JobCancelled          somebody cancelled the job that the caller waited for
└── GenerationFailed      accepted, and could not be finished; `reason` says why

`rpc.errors` is the one module that knows both these and gRPC's status codes. The exceptions
cross the boundary between processes as ``Failure``, which is plain data.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Why a call failed, for programs; sent as ``google.rpc.ErrorInfo.reason``."""

    INVALID_REQUEST = "INVALID_REQUEST"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    UNKNOWN_REQUEST = "UNKNOWN_REQUEST"
    REQUEST_CONFLICT = "REQUEST_CONFLICT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    REPLY_TOO_LARGE = "REPLY_TOO_LARGE"
    QUEUE_FULL = "QUEUE_FULL"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    MODEL_LOADING = "MODEL_LOADING"
    DRAINING = "DRAINING"
    READER_STALLED = "READER_STALLED"
    DOES_NOT_FIT = "DOES_NOT_FIT"
    DEADLINE_EXPIRED = "DEADLINE_EXPIRED"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    CANCELLED = "CANCELLED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NON_FINITE = "NON_FINITE"
    SCHEDULER_FAILED = "SCHEDULER_FAILED"
    ENGINE_FAILED = "ENGINE_FAILED"
    ENGINE_CRASHED = "ENGINE_CRASHED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with one field of a request, and what would be right."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the engine gave a job up, as plain data: ``message`` is meant for the caller."""

    reason: Reason
    message: str
    metadata: dict[str, str] = field(default_factory=dict)


class DarkroomError(Exception):
    """The root of the tree. ``str()`` of an instance is a sentence meant for the caller."""

    reason: Reason = Reason.INTERNAL

    def __init__(self, message: str, metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.metadata = metadata or {}


class InvalidRequest(DarkroomError):
    """The request is wrong; ``violations`` lists everything that is, at once."""

    reason = Reason.INVALID_REQUEST

    def __init__(
        self, violations: list[Violation], reason: Reason = Reason.INVALID_REQUEST
    ) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.reason = reason
        self.violations = violations


class UnknownModel(DarkroomError):
    """No model of that name is held; ``known`` are the names that are."""

    reason = Reason.UNKNOWN_MODEL

    def __init__(self, model: str, known: list[str]) -> None:
        super().__init__(f"no model {model!r}; this server holds {', '.join(known) or 'none'}")
        self.model = model
        self.known = known


class UnknownRequest(DarkroomError):
    """No job of that id is known to this caller, or known any more."""

    reason = Reason.UNKNOWN_REQUEST

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"no generation {request_id!r}: it was never asked for by this caller, or its result "
            "is not kept any more"
        )
        self.request_id = request_id


class RequestConflict(DarkroomError):
    """The caller used this id for a request with other fields."""

    reason = Reason.REQUEST_CONFLICT

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request_id {request_id!r} names a generation with other fields; use a new id, or "
            "the same fields"
        )
        self.request_id = request_id


class Unauthenticated(DarkroomError):
    """No token, or none that this server knows."""

    reason = Reason.UNAUTHENTICATED


class NotAllowed(DarkroomError):
    """The caller is known, and may not make this call."""

    reason = Reason.PERMISSION_DENIED


class Refused(DarkroomError):
    """Refused before any work; ``retry_after`` in seconds, None where trying again is vain."""

    def __init__(
        self,
        message: str,
        retry_after: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, metadata)
        self.retry_after = retry_after


class QueueFull(Refused):
    """The server has accepted as much as it will hold."""

    reason = Reason.QUEUE_FULL


class QuotaExceeded(Refused):
    """This caller has its share; ``subject`` and ``description`` say of what."""

    reason = Reason.QUOTA_EXCEEDED

    def __init__(self, subject: str, description: str, retry_after: float | None = None) -> None:
        super().__init__(description, retry_after)
        self.subject = subject


class NotReady(Refused):
    """The model is still loading, or the server is going away (``reason`` tells)."""

    def __init__(self, message: str, reason: Reason, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.reason = reason


class ReaderStalled(Refused):
    """The caller did not read its stream for too long; the job goes on as after a disconnect."""

    reason = Reason.READER_STALLED


class TooLarge(Refused):
    """The request never fits this machine's memory, even alone."""

    reason = Reason.DOES_NOT_FIT


class DeadlineExceeded(DarkroomError):
    """The caller's deadline passed, or would pass before the job could finish."""

    def __init__(
        self,
        message: str,
        reason: Reason = Reason.DEADLINE_EXPIRED,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, metadata)
        self.reason = reason


class JobCancelled(DarkroomError):
    """The job was cancelled by somebody else than the one who waits for it."""

    reason = Reason.CANCELLED


class GenerationFailed(DarkroomError):
    """The engine gave an accepted job up, for ``failure.reason``."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, dict(failure.metadata))
        self.reason = failure.reason
        self.failure = failure


class StartupError(Exception):
    """The server cannot start; the text is one line for the operator, with what to do."""
