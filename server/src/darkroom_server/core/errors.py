"""Every error that a caller can get, as a small closed tree.

DarkroomError
├── InvalidRequest        correct the request
├── UnknownModel          name another model
├── UnknownAdapter        name another adapter
├── UnknownRequest        no job of that id is known, or its result is no longer kept
├── AdapterUnusable       the adapter cannot be offered now; the text says why
├── ModelUnusable         the model cannot be loaded; the text says why
├── ModelMemory           the models that must stay in memory leave no room for this one
├── UploadNotFound        upload the image again
├── RequestConflict       the same caller used that id for another request
├── Unauthenticated       send a valid token
├── NotAllowed            this caller may not make this call
├── Refused               the request is valid, but the server cannot accept it now
│   ├── QueueFull         retry after `retry_after`
│   ├── QuotaExceeded     this caller has reached its quota; retry after `retry_after`
│   ├── NotReady          retry after `retry_after`
│   ├── ReaderStalled     the stream was not read; begin another one
│   ├── LedgerUnreachable accepted jobs cannot be written down; retry after `retry_after`
│   └── TooLarge          never fits this machine
├── DeadlineExceeded      set a later deadline
│   └── DeadlineUnreachable   rejected: it would pass before the job could finish
├── JobCancelled          another call cancelled the job
└── GenerationFailed      accepted, but failed; `reason` says why

`rpc.errors` is the only module that knows both these errors and gRPC's status codes. Between the
processes an error is a ``Failure``, which is plain data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Why a call failed, for programs; sent as ``google.rpc.ErrorInfo.reason``."""

    INVALID_REQUEST = "INVALID_REQUEST"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    UNKNOWN_ADAPTER = "UNKNOWN_ADAPTER"
    ADAPTER_UNUSABLE = "ADAPTER_UNUSABLE"
    MODEL_UNUSABLE = "MODEL_UNUSABLE"
    MODEL_MEMORY = "MODEL_MEMORY"
    UNKNOWN_REQUEST = "UNKNOWN_REQUEST"
    REQUEST_CONFLICT = "REQUEST_CONFLICT"
    UPLOAD_NOT_FOUND = "UPLOAD_NOT_FOUND"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    REPLY_TOO_LARGE = "REPLY_TOO_LARGE"
    QUEUE_FULL = "QUEUE_FULL"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    MODEL_LOADING = "MODEL_LOADING"
    DRAINING = "DRAINING"
    READER_STALLED = "READER_STALLED"
    LEDGER_UNREACHABLE = "LEDGER_UNREACHABLE"
    DOES_NOT_FIT = "DOES_NOT_FIT"
    DEADLINE_EXPIRED = "DEADLINE_EXPIRED"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    CANCELLED = "CANCELLED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NON_FINITE = "NON_FINITE"
    SCHEDULER_FAILED = "SCHEDULER_FAILED"
    ENGINE_FAILED = "ENGINE_FAILED"
    ENGINE_CRASHED = "ENGINE_CRASHED"
    MODEL_GONE = "MODEL_GONE"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Violation:
    """One error in one field of a request, and what would be valid."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed, as plain data; ``message`` is for the caller.

    ``violations`` are errors of the request that only the engine can find.
    """

    reason: Reason
    message: str
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()

    @classmethod
    def of(cls, error: "DarkroomError") -> "Failure":
        """``error`` as plain data."""
        return cls(error.reason, str(error), dict(error.metadata), tuple(error.violations))


class DarkroomError(Exception):
    """The root of the tree. ``str()`` of an instance is a message for the caller.

    ``violations`` are those of the request, if it is at fault.
    """

    reason: Reason = Reason.INTERNAL
    violations: Sequence[Violation] = ()

    def __init__(self, message: str, metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.metadata = metadata or {}


class InvalidRequest(DarkroomError):
    """The request is invalid; ``violations`` lists all errors at once."""

    reason = Reason.INVALID_REQUEST

    def __init__(
        self, violations: list[Violation], reason: Reason = Reason.INVALID_REQUEST
    ) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.reason = reason
        self.violations = violations


class UnknownModel(DarkroomError):
    """The server has no model of that name; ``known`` are the names that it has."""

    reason = Reason.UNKNOWN_MODEL

    def __init__(self, model: str, known: list[str]) -> None:
        super().__init__(f"no model {model!r}; this server holds {', '.join(known) or 'none'}")
        self.model = model
        self.known = known


class UnknownAdapter(DarkroomError):
    """There is no adapter of that name; ``known`` are the names that there are.

    ``place``: what was searched.
    """

    reason = Reason.UNKNOWN_ADAPTER

    def __init__(self, adapter: str, known: Sequence[str], place: str = "this server") -> None:
        super().__init__(f"no adapter {adapter!r}; {place} has {', '.join(known) or 'none'}")
        self.adapter = adapter


class AdapterUnusable(DarkroomError):
    """The adapter is there, and the server cannot offer it as it is now."""

    reason = Reason.ADAPTER_UNUSABLE


class ModelUnusable(DarkroomError):
    """The model is in the catalogue, and cannot be loaded."""

    reason = Reason.MODEL_UNUSABLE

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"model {model!r} cannot be loaded: {why}")


class ModelMemory(DarkroomError):
    """The models that must stay in memory leave no room for this one."""

    reason = Reason.MODEL_MEMORY

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"no memory for model {model!r}: {why}")


class UnknownRequest(DarkroomError):
    """This caller has no job of that id, or its result is no longer kept."""

    reason = Reason.UNKNOWN_REQUEST

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"no generation {request_id!r}: this caller never requested it, or its result is no "
            "longer kept"
        )
        self.request_id = request_id


class UploadNotFound(DarkroomError):
    """The server does not have these uploads of this caller, or has removed them."""

    reason = Reason.UPLOAD_NOT_FOUND

    def __init__(self, upload_ids: Sequence[str]) -> None:
        named = ",".join(upload_ids)
        super().__init__(
            f"this caller has no upload {named} here, or it was removed; upload it again",
            metadata={"upload_ids": named},
        )


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
    """The token is missing or unknown."""

    reason = Reason.UNAUTHENTICATED


class NotAllowed(DarkroomError):
    """The caller is known, but may not make this call."""

    reason = Reason.PERMISSION_DENIED


class Refused(DarkroomError):
    """Rejected before any work; ``retry_after`` in seconds, None if a retry cannot succeed."""

    def __init__(
        self,
        message: str,
        retry_after: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, metadata)
        self.retry_after = retry_after


class QueueFull(Refused):
    """The queue is full."""

    reason = Reason.QUEUE_FULL


class QuotaExceeded(Refused):
    """This caller has reached the quota that ``subject`` and ``description`` name."""

    reason = Reason.QUOTA_EXCEEDED

    def __init__(self, subject: str, description: str, retry_after: float | None = None) -> None:
        super().__init__(description, retry_after)
        self.subject = subject


class NotReady(Refused):
    """The model is still loading, or the server is draining; see ``reason``."""

    def __init__(
        self,
        message: str,
        reason: Reason,
        retry_after: float,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, retry_after, metadata)
        self.reason = reason


class ReaderStalled(Refused):
    """The caller did not read its stream for too long; the job goes on as after a disconnect."""

    reason = Reason.READER_STALLED


class LedgerUnreachable(Refused):
    """The ledger of accepted jobs cannot be read or written; what runs goes on."""

    reason = Reason.LEDGER_UNREACHABLE


class TooLarge(Refused):
    """The request never fits this machine's memory, even alone."""

    reason = Reason.DOES_NOT_FIT


class DeadlineExceeded(DarkroomError):
    """The caller's deadline passed."""

    reason = Reason.DEADLINE_EXPIRED


class DeadlineUnreachable(DeadlineExceeded):
    """Rejected before any work: the deadline would pass before the job could finish."""

    reason = Reason.DEADLINE_UNREACHABLE


class JobCancelled(DarkroomError):
    """Another call cancelled the job that the caller waited for."""

    reason = Reason.CANCELLED


class GenerationFailed(DarkroomError):
    """An accepted job failed, for ``failure.reason``."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, dict(failure.metadata))
        self.reason = failure.reason
        self.violations = failure.violations
        self.failure = failure


class StartupError(Exception):
    """The server cannot start; the text is one line for the operator, with a remedy."""


class InvalidSettings(StartupError):
    """Settings are wrong; ``problems`` has one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)
