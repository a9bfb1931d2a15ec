"""Every domain error has a status, and every status has its details."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from darkroom_server.core import errors
from darkroom_server.core.errors import (
    AdapterUnusable,
    DarkroomError,
    DeadlineExceeded,
    DeadlineUnreachable,
    Failure,
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
    RequestConflict,
    TooLarge,
    Unauthenticated,
    UnknownAdapter,
    UnknownModel,
    UnknownRequest,
    UploadNotFound,
    Violation,
)
from darkroom_server.rpc.errors import CODES, internal_error, status_of
from darkroom_server.service.summary import Outcome, outcome_of

EXAMPLES: list[tuple[DarkroomError, grpc.StatusCode, str | None, Outcome]] = [
    (
        InvalidRequest([Violation("prompt", "must not be empty")]),
        grpc.StatusCode.INVALID_ARGUMENT,
        None,
        Outcome.INVALID,
    ),
    (UnknownModel("x", ["demo"]), grpc.StatusCode.NOT_FOUND, None, Outcome.INVALID),
    (UnknownAdapter("x", ["outline"]), grpc.StatusCode.NOT_FOUND, None, Outcome.INVALID),
    (
        AdapterUnusable("fits no model"),
        grpc.StatusCode.FAILED_PRECONDITION,
        None,
        Outcome.INVALID,
    ),
    (
        ModelUnusable("x", "it is damaged"),
        grpc.StatusCode.FAILED_PRECONDITION,
        None,
        Outcome.REFUSED,
    ),
    (ModelMemory("x", "9 bytes"), grpc.StatusCode.FAILED_PRECONDITION, None, Outcome.REFUSED),
    (UnknownRequest("r"), grpc.StatusCode.NOT_FOUND, None, Outcome.INVALID),
    (UploadNotFound(["sha256:0"]), grpc.StatusCode.FAILED_PRECONDITION, None, Outcome.INVALID),
    (RequestConflict("r"), grpc.StatusCode.ALREADY_EXISTS, None, Outcome.INVALID),
    (Unauthenticated("who?"), grpc.StatusCode.UNAUTHENTICATED, None, Outcome.REFUSED),
    (NotAllowed("no"), grpc.StatusCode.PERMISSION_DENIED, None, Outcome.REFUSED),
    (JobCancelled("gone"), grpc.StatusCode.CANCELLED, "-1", Outcome.CANCELLED),
    (
        QuotaExceeded("jobs", "has 4 jobs, and may have 4"),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "-1",
        Outcome.REFUSED,
    ),
    (QueueFull("full", 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "1500", Outcome.REFUSED),
    (
        NotReady("loading", Reason.MODEL_LOADING, 2.0),
        grpc.StatusCode.UNAVAILABLE,
        "2000",
        Outcome.REFUSED,
    ),
    (ReaderStalled("unread", 1.0), grpc.StatusCode.UNAVAILABLE, "1000", Outcome.REFUSED),
    (LedgerUnreachable("full", 1.0), grpc.StatusCode.UNAVAILABLE, "1000", Outcome.REFUSED),
    (
        TooLarge("no", metadata={"needed_bytes": "2"}),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "-1",
        Outcome.REFUSED,
    ),
    (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED, None, Outcome.EXPIRED),
    (DeadlineUnreachable("soon"), grpc.StatusCode.DEADLINE_EXCEEDED, None, Outcome.REFUSED),
    (
        GenerationFailed(Failure(Reason.OUT_OF_MEMORY, "no memory")),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "-1",
        Outcome.FAILED,
    ),
    (
        GenerationFailed(Failure(Reason.NON_FINITE, "not numbers")),
        grpc.StatusCode.INTERNAL,
        None,
        Outcome.FAILED,
    ),
    (
        GenerationFailed(Failure(Reason.INVALID_REQUEST, "prompt: too long")),
        grpc.StatusCode.INVALID_ARGUMENT,
        None,
        Outcome.INVALID,
    ),
]


def leaf_classes(root: type[DarkroomError]) -> set[type[DarkroomError]]:
    below = root.__subclasses__()
    return set().union(*map(leaf_classes, below)) if below else {root}


def test_every_error_has_a_code_and_an_example() -> None:
    # The one class that is raised itself, and has a subclass.
    assert set(CODES) == leaf_classes(errors.DarkroomError) | {DeadlineExceeded}
    assert {type(example[0]) for example in EXAMPLES} == set(CODES)


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda example: f"{type(example[0]).__name__}-{example[0].reason}"
)
def test_statuses_carry_reason_and_pushback(
    example: tuple[DarkroomError, grpc.StatusCode, str | None, Outcome],
) -> None:
    error, code, pushback, outcome = example
    status = status_of(error)
    assert (status.code, status.details) == (code, str(error))
    trailers = dict(status.trailing_metadata)
    assert trailers.get("grpc-retry-pushback-ms") == pushback
    rich = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (
        error.reason.value,
        "darkroom",
        error.metadata,
    )
    assert outcome_of(error) is outcome


def test_long_texts_are_cut_to_the_size_of_trailers() -> None:
    many = [Violation(f"field{number}", "x" * 100) for number in range(500)]
    status = status_of(InvalidRequest(many))
    assert len(status.details) == 1000
    size = sum(len(key) + len(value) for key, value in status.trailing_metadata)
    assert size + len(status.details) < 8192


def test_an_internal_error_has_no_details() -> None:
    assert internal_error().details == "internal error"
