"""The cancel call of a client that stops waiting: which server gets it, and which never does."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import pytest

from darkroom.v1.generation_pb2 import GenerateRequest, GenerateStreamRequest
from darkroom.v1.generation_pb2_grpc import GenerationServiceStub
from darkroom_client import Cancelled, Client, Retry, ServerState
from darkroom_client._transport.server_address import server_address
from darkroom_client.testing import Behaviour, FakeServer, JobState
from darkroom_client.testing._job import FakeJob
from darkroom_client.testing._services import Services
from tests.client.conftest import Connect

HELD = Behaviour(hold=threading.Event())


@pytest.fixture
def cancel_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Services, str]]:
    """Each cancel call that a fake server gets: which server, and for which job."""
    calls: list[tuple[Services, str]] = []
    answer = Services.CancelGeneration

    def record(self: Services, request: Any, context: Any) -> Any:
        calls.append((self, request.request_id))
        return answer(self, request, context)

    monkeypatch.setattr(Services, "CancelGeneration", record)
    return calls


@pytest.fixture
def two(cancel_calls: list[tuple[Services, str]]) -> Iterator[tuple[FakeServer, FakeServer]]:
    """Two servers, whose jobs run until they are cancelled."""
    with FakeServer() as one, FakeServer() as other:
        for server in (one, other):
            server.script(default=HELD)
        yield one, other


def shared_target(servers: tuple[FakeServer, FakeServer]) -> str:
    return "ipv4:" + ",".join(server.target for server in servers)


def test_a_closed_stream_cancels_its_job_at_the_server_that_has_it(
    connect: Connect,
    two: tuple[FakeServer, FakeServer],
    cancel_calls: list[tuple[Services, str]],
) -> None:
    client = connect(shared_target(two))
    expected = set()
    for at in range(16):
        if at % 3 == 0:
            client.models()  # Or calls by turns would meet the right server each time.
        with client.stream("a star") as stream:
            next(stream)
            (server,) = filter(is_busy, two)
            expected.add((server._services, stream.request_id))
        server.wait_for(partial(is_idle, server))
    client.close()

    assert set(cancel_calls) == expected
    assert len(cancel_calls) == 16
    assert all(server.jobs for server in two)


def is_busy(server: FakeServer) -> bool:
    return any(job.state is JobState.RUNNING for job in server.jobs)


def is_idle(server: FakeServer) -> bool:
    return not is_busy(server)


def test_a_closed_client_cancels_each_job_at_the_server_that_has_it(
    connect: Connect,
    two: tuple[FakeServer, FakeServer],
    cancel_calls: list[tuple[Services, str]],
) -> None:
    client = connect(shared_target(two))
    streams = [client.stream("a star").__enter__() for _ in range(8)]
    for stream in streams:
        next(stream)
    # Or calls by turns would meet the right server each time.
    streams.pop(3).close()

    client.close()

    assert all(job.state is JobState.CANCELLED for server in two for job in server.jobs)
    assert len(cancel_calls) == len({request_id for _, request_id in cancel_calls}) == 8


def test_a_server_id_leads_nowhere_that_the_target_does_not(
    connect: Connect,
    two: tuple[FakeServer, FakeServer],
    cancel_calls: list[tuple[Services, str]],
) -> None:
    with FakeServer(token="secret") as elsewhere:
        for server in two:
            server._services.server_id = elsewhere.target
        client = connect(shared_target(two), token="secret", insecure=True)
        with client.stream("a star") as stream:
            next(stream)
        client.close()

    # Still one call, over the ordinary channel, to one of the two.
    ((services, request_id),) = cancel_calls
    assert services in {server._services for server in two}
    assert request_id == stream.request_id


def test_a_unary_call_of_a_closed_client_makes_one_cancel_call(
    connect: Connect,
    two: tuple[FakeServer, FakeServer],
    cancel_calls: list[tuple[Services, str]],
) -> None:
    accepting, draining = two
    draining.state = ServerState.DRAINING
    client = connect(shared_target(two))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, "a star", request_id="r-1")
        accepting.wait_for(lambda: len(accepting.jobs) == 1)
        client.close()
        with pytest.raises(Cancelled):
            call.result(60)

    # Its answer would name the server too late: either server may get the call.
    assert [request_id for _, request_id in cancel_calls] == ["r-1"]


NAMES = {
    "darkroom.test": ["10.0.0.1", "10.0.0.2", "fd00::1"],
    "alone.test": ["10.0.0.1"],
    "gpu-1.test": ["10.0.0.1"],
    "gpu-2.test": ["10.0.0.2"],
    "gpu-6.test": ["fd00::1"],
    "other.test": ["10.9.9.9"],
}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolves the host names of ``NAMES``, and IP addresses; other names do not resolve."""
    resolve = socket.getaddrinfo

    def look_up(host: str, port: int, **options: Any) -> Any:
        addresses = NAMES.get(host, [host])
        return [
            found
            for address in addresses
            for found in resolve(address, port, flags=socket.AI_NUMERICHOST, **options)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("server_id", "target", "address"),
    [
        ("gpu-2.test:50051", "darkroom.test:50051", "ipv4:10.0.0.2:50051"),
        ("gpu-2.test:50051", "dns:///darkroom.test:50051", "ipv4:10.0.0.2:50051"),
        ("10.0.0.1:50051", "darkroom.test:50051", "ipv4:10.0.0.1:50051"),
        ("gpu-6.test:50051", "darkroom.test:50051", "ipv6:[fd00::1]:50051"),
        ("[fd00::1]:50051", "darkroom.test:50051", "ipv6:[fd00::1]:50051"),
        ("gpu-1.test:1", "ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1"),
        # Another port, another host, a name that is unknown here, or no name at all.
        ("gpu-2.test:50052", "darkroom.test:50051", None),
        ("other.test:50051", "darkroom.test:50051", None),
        ("pod-7f9c:50051", "darkroom.test:50051", None),
        ("gpu-2.test", "darkroom.test:50051", None),
        ("", "darkroom.test:50051", None),
        ("\udc80:50051", "darkroom.test:50051", None),
        (f"{'x' * 80}.test:50051", "darkroom.test:50051", None),
        # Any call gets there.
        ("gpu-1.test:50051", "alone.test:50051", None),
        # Names that another name server resolves, and targets without addresses.
        ("gpu-2.test:50051", "dns://10.0.0.53/darkroom.test:50051", None),
        ("gpu-2.test:50051", "unix:/run/darkroom.sock", None),
        ("gpu-2.test:50051", "xds:///darkroom.test:50051", None),
    ],
)
def test_the_address_of_a_server(server_id: str, target: str, address: str | None) -> None:
    assert server_address(server_id, target, 30.0) == address


def test_a_name_that_does_not_resolve_in_time_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(60) and [])

    began = time.monotonic()
    assert server_address("gpu-1.test:1", "darkroom.test:1", 0.05) is None

    assert time.monotonic() - began < 30.0
    released.set()


def test_a_call_cancelled_before_its_first_message_cancels_its_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = FakeJob.accepted

    def cancel_and_answer(job: FakeJob, *args: Any, **options: Any) -> Any:
        call.cancel()
        server.wait_for(lambda: job.state is JobState.CANCELLED)
        return answer(job, *args, **options)

    monkeypatch.setattr(FakeJob, "accepted", cancel_and_answer)
    with FakeServer() as server, grpc.insecure_channel(server.target) as channel:
        server.script(HELD)
        request = GenerateStreamRequest(generation=GenerateRequest(prompt="a star"))
        call = GenerationServiceStub(channel).GenerateStream(request)
        server.wait_for(lambda: bool(server.jobs))
        server.wait_for(lambda: server.jobs[0].state is JobState.CANCELLED)


def test_a_job_that_drops_its_caller_at_once_drops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = FakeJob.accepted
    drops: list[bool] = []

    def answer_after_the_drop(job: FakeJob, *args: Any, **options: Any) -> Any:
        server.wait_for(lambda: job.drops == 1)
        drops.append(options["joined"])
        return answer(job, *args, **options)

    monkeypatch.setattr(FakeJob, "accepted", answer_after_the_drop)
    with FakeServer() as server, Client(server.target, retry=Retry(initial_backoff=0.01)) as client:
        server.script(Behaviour(drop_at_step=1))
        with client.stream("a star", steps=2) as stream:
            stream.result()

    assert drops == [False, True]
