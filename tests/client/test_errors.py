"""The client's error for each error of the server, of gRPC and of the network."""

import pickle
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo

import darkroom_client
from darkroom_client import (
    AsyncClient,
    Cancelled,
    DarkroomError,
    DeadlineExceeded,
    DeadlineUnreachable,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    ReplyTooLarge,
    Retry,
    ServerError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
    Violation,
)
from darkroom_client._protocol.rpc_errors import CODES, REASONS, from_rpc_error
from darkroom_server.core.errors import Reason
from tests.client.conftest import Connect
from tests.client.scripted import ScriptedServer, fail
from tests.server.wire import serving

CODE = grpc.StatusCode

WITH_REASON = [
    (CODE.INVALID_ARGUMENT, "INVALID_REQUEST", InvalidRequest),
    (CODE.INVALID_ARGUMENT, "REPLY_TOO_LARGE", ReplyTooLarge),
    (CODE.NOT_FOUND, "UNKNOWN_MODEL", ModelNotFound),
    (CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL", Overloaded),
    (CODE.RESOURCE_EXHAUSTED, "DOES_NOT_FIT", TooLarge),
    (CODE.UNAVAILABLE, "MODEL_LOADING", Unavailable),
    (CODE.UNAVAILABLE, "DRAINING", Unavailable),
    (CODE.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED", DeadlineExceeded),
    (CODE.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE", DeadlineUnreachable),
    (CODE.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", GenerationFailed),
    (CODE.INTERNAL, "NON_FINITE", GenerationFailed),
    (CODE.INTERNAL, "SCHEDULER_FAILED", GenerationFailed),
    (CODE.INTERNAL, "ENGINE_FAILED", GenerationFailed),
    (CODE.INTERNAL, "ENGINE_CRASHED", GenerationFailed),
    (CODE.INTERNAL, "INTERNAL", ServerError),
    (CODE.UNAVAILABLE, "ENGINE_FAILED", Unavailable),
    (CODE.UNAVAILABLE, "A_NEWER_REASON", Unavailable),
]

BARE = [
    (CODE.CANCELLED, Cancelled),
    (CODE.UNAUTHENTICATED, Unauthenticated),
    (CODE.PERMISSION_DENIED, PermissionDenied),
    (CODE.RESOURCE_EXHAUSTED, Overloaded),
    (CODE.UNIMPLEMENTED, Unsupported),
    (CODE.DEADLINE_EXCEEDED, DeadlineExceeded),
    (CODE.UNKNOWN, ServerError),
    (CODE.INTERNAL, ServerError),
    (CODE.DATA_LOSS, ServerError),
]


@pytest.fixture
def impatient(connect: Connect, server: ScriptedServer) -> Any:
    """A client that tries once."""
    return connect(server.address, retry=Retry(attempts=1))


def caught(client: Any, **options: Any) -> DarkroomError:
    with pytest.raises(DarkroomError) as info:
        client.generate("a star", request_id="r-1", **options)
    return info.value


@pytest.mark.parametrize(("code", "reason", "kind"), WITH_REASON)
def test_the_reason_selects_the_class(
    impatient: Any,
    server: ScriptedServer,
    code: grpc.StatusCode,
    reason: str,
    kind: type[DarkroomError],
) -> None:
    server.script.append(fail(code, reason, "because of this", metadata={"needed_bytes": "9"}))

    error = caught(impatient)

    assert type(error) is kind
    assert str(error) == "because of this"
    assert (error.code, error.reason, error.request_id) == (code.name, reason, "r-1")
    assert error.metadata == {"needed_bytes": "9"}
    assert error.retry_after is None


@pytest.mark.parametrize(("code", "kind"), BARE)
def test_without_a_reason_the_code_selects_the_class(
    impatient: Any, server: ScriptedServer, code: grpc.StatusCode, kind: type[DarkroomError]
) -> None:
    server.script.append(fail(code))

    error = caught(impatient)

    assert type(error) is kind
    assert (error.code, error.reason) == (code.name, "")


def test_violations_come_with_their_fields(impatient: Any, server: ScriptedServer) -> None:
    bad = BadRequest(
        field_violations=[
            BadRequest.FieldViolation(field="width", description="is 7"),
            BadRequest.FieldViolation(field="steps", description="is 0"),
        ]
    )
    server.script.append(fail(CODE.INVALID_ARGUMENT, "INVALID_REQUEST", "two", [bad]))

    assert caught(impatient).violations == (
        Violation(field="width", description="is 7"),
        Violation(field="steps", description="is 0"),
    )


@pytest.mark.parametrize(
    ("details", "kind", "seconds"),
    [
        ([RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))], Overloaded, 1.5),
        ([QuotaFailure()], QuotaExceeded, None),
    ],
)
def test_overload_has_retry_after(
    impatient: Any,
    server: ScriptedServer,
    details: list[Message],
    kind: type[DarkroomError],
    seconds: float | None,
) -> None:
    server.script.append(fail(CODE.RESOURCE_EXHAUSTED, "", "full", details))

    error = caught(impatient)

    assert type(error) is kind
    assert error.retry_after == seconds


def test_a_reply_over_the_clients_limit_says_what_to_do(
    connect: Connect, server: ScriptedServer
) -> None:
    error = caught(connect(server.address, max_reply_bytes=100))

    assert type(error) is ReplyTooLarge
    assert "max_reply_bytes" in str(error)
    assert server.metadata[0]["darkroom-max-reply-bytes"] == "100"
    assert len(server.requests) == 1


def test_the_error_names_a_server_that_is_down(connect: Connect) -> None:
    with ScriptedServer() as gone:
        pass
    client = connect(gone.address, retry=Retry(attempts=3, initial_backoff=0.01, max_backoff=0.01))

    for call in (client.models, lambda: client.generate("a star")):
        error = client_error(call)
        assert type(error) is Unavailable
        assert gone.address in str(error)
        assert "darkroom-server serve" in str(error)
        assert "DARKROOM_TARGET" in str(error)


def client_error(call: Any) -> DarkroomError:
    with pytest.raises(DarkroomError) as info:
        call()
    return info.value


def test_a_server_without_these_calls_says_so(connect: Connect) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        error = client_error(connect(f"127.0.0.1:{port}").models)
        server.stop(None).wait()

    assert type(error) is Unsupported
    assert "is it Darkroom" in str(error)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_of_the_server_is_mapped(reason: Reason) -> None:
    assert reason.value in REASONS


def test_every_status_code_of_grpc_is_mapped() -> None:
    assert set(CODES) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_the_documented_tree_is_complete() -> None:
    documented = darkroom_client._errors.__doc__ or ""
    exported = [getattr(darkroom_client, name) for name in darkroom_client.__all__]
    for kind in exported:
        if isinstance(kind, type) and issubclass(kind, DarkroomError):
            assert kind.__name__ in documented


def test_errors_can_be_pickled() -> None:
    error = Overloaded("full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", retry_after=2.0)

    copy = pickle.loads(pickle.dumps(error))

    assert (str(copy), copy.code, copy.reason, copy.retry_after) == (
        "full",
        "RESOURCE_EXHAUSTED",
        "QUEUE_FULL",
        2.0,
    )


def test_an_unreachable_deadline_has_the_estimate(impatient: Any, server: ScriptedServer) -> None:
    figures = {"estimate_seconds": "80.000", "queue_wait_seconds": "2.5"}
    server.script.extend(
        [
            fail(CODE.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE", metadata=figures),
            fail(CODE.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED", metadata={"estimate_seconds": "soon"}),
        ]
    )

    known, unknown = caught(impatient), caught(impatient)

    assert type(known) is DeadlineUnreachable
    assert (known.estimate, known.queue_wait) == (80.0, 2.5)
    assert type(unknown) is DeadlineExceeded
    assert (unknown.estimate, unknown.queue_wait) == (None, None)


class Garbled(grpc.RpcError):
    """An error whose details cannot be read."""

    def __init__(self, details: bytes) -> None:
        self._trailers = (("grpc-status-details-bin", details),)

    def code(self) -> grpc.StatusCode:
        return CODE.INTERNAL

    def details(self) -> str:
        return "broken"

    def trailing_metadata(self) -> Any:
        return self._trailers


def test_broken_details_are_ignored() -> None:
    inner = status_pb2.Status(code=13, message="broken")
    inner.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")

    for details in (b"\xff\xff", inner.SerializeToString()):
        error = from_rpc_error(Garbled(details), address="a:1", timeout=None)
        assert (type(error), error.reason, str(error)) == (ServerError, "", "broken")


async def test_a_call_without_request_id_gets_the_id_of_the_server() -> None:
    async with serving() as wire, AsyncClient(wire.server.address) as client:
        with pytest.raises(ModelNotFound) as caught:
            await client.model("nope")
        with pytest.raises(InvalidRequest) as named:
            await client.generate("a star", steps=0, request_id="mine")

    assert caught.value.request_id
    assert named.value.request_id == "mine"


def test_a_rejected_deadline_has_the_needed_timeout() -> None:
    assert DeadlineExceeded("late", metadata={"needed_seconds": "4.5"}).needed == 4.5
    assert DeadlineExceeded("late").needed is None
