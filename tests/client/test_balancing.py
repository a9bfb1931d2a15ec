"""Load balancing: new jobs by health, other calls round-robin; no job is lost."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from darkroom.v1 import generation_pb2
from darkroom_client import Accepted, Retry, ServerState, Unavailable, UnknownRequest
from darkroom_client.testing import Behaviour, FakeServer, JobState
from tests.client.conftest import Connect
from tests.client.scripted import SERVICE, ScriptedServer, fail, respond

ONCE = Retry(attempts=1)
SOON = Retry(attempts=5, initial_backoff=0.01, max_backoff=0.05)


def generate(client: Any) -> Any:
    return client.generate("a star")


def generate_many(client: Any) -> Any:
    (answer,) = client.generate_many(["a star"])
    if isinstance(answer, Exception):
        raise answer
    return answer


def stream(client: Any) -> Any:
    with client.stream("a star") as events:
        return events.result()


def submit(client: Any) -> Any:
    return client.submit("a star")


Begin = Callable[[Any], Any]
BEGINS = [generate, generate_many, stream, submit]
begins = pytest.mark.parametrize("begin", BEGINS)


def refused(server: FakeServer) -> int:
    return server._registry.rejections.total()


@pytest.fixture
def two() -> Iterator[tuple[FakeServer, FakeServer, str]]:
    """Two servers, and one target for both."""
    with FakeServer() as one, FakeServer() as other:
        yield one, other, f"ipv4:{one.target},{other.target}"


def test_new_jobs_skip_a_draining_server(
    connect: Connect, two: tuple[FakeServer, FakeServer, str]
) -> None:
    leaving, staying, target = two
    leaving.state = ServerState.DRAINING
    client = connect(target, retry=ONCE)

    for begin in BEGINS * 2:
        begin(client)

    assert (refused(leaving), len(leaving.jobs), len(staying.jobs)) == (0, 0, 8)


def test_a_connected_client_notices_that_a_server_drains(
    connect: Connect, two: tuple[FakeServer, FakeServer, str]
) -> None:
    leaving, staying, target = two
    client = connect(target, retry=SOON)
    before = 0, 0
    while min(before) == 0 and sum(before) < 1000:
        client.generate("a star")
        before = len(leaving.jobs), len(staying.jobs)
    leaving.state = ServerState.DRAINING

    # The first of them may not know it yet.
    tries, spared = 0, 0
    while spared < 8 and tries < 1000:
        refusals = refused(leaving)
        client.generate("a star")
        tries += 1
        spared = spared + 1 if refused(leaving) == refusals else 0

    assert min(before) > 0
    assert spared == 8
    assert (len(leaving.jobs), len(staying.jobs)) == (before[0], before[1] + tries)


def test_a_job_of_a_draining_server_can_be_watched_and_cancelled(
    connect: Connect, two: tuple[FakeServer, FakeServer, str]
) -> None:
    leaving, _, target = two
    released = threading.Event()
    leaving.script(default=Behaviour(hold=released))
    kept, unwanted = (connect(leaving.target).submit("a star").request_id for _ in range(2))
    leaving.state = ServerState.DRAINING
    client = connect(target)

    with client.watch(kept) as watch:
        assert next(watch).joined
        # Round-robin: the other server does not know it.
        assert any(cancelled(client, unwanted) for _ in range(4))
        released.set()
        assert watch.result().images

    assert [job.state for job in leaving.jobs] == [JobState.FINISHED, JobState.CANCELLED]


def cancelled(client: Any, request_id: str) -> bool:
    try:
        return bool(client.cancel(request_id))
    except UnknownRequest:
        return False


def test_a_stream_rejoins_its_job_on_a_draining_server(
    connect: Connect, two: tuple[FakeServer, FakeServer, str]
) -> None:
    released = threading.Event()
    for server in two[:2]:
        server.script(default=Behaviour(hold=released, drop_at_step=1))
    client = connect(two[2], retry=SOON)

    with client.stream("a star") as events:
        assert isinstance(next(events), Accepted)
        (serving_one,) = (server for server in two[:2] if server.jobs)
        serving_one.state = ServerState.DRAINING
        released.set()
        assert events.result().images

    assert sum(len(server.jobs) for server in two[:2]) == 1


@begins
@pytest.mark.parametrize("retry", [ONCE, Retry(attempts=2), SOON])
@pytest.mark.parametrize(
    ("state", "reason"),
    [(ServerState.LOADING, "MODEL_LOADING"), (ServerState.DRAINING, "DRAINING")],
)
def test_the_only_server_gives_its_own_reason(
    connect: Connect,
    fake: FakeServer,
    begin: Begin,
    retry: Retry,
    state: ServerState,
    reason: str,
) -> None:
    fake.state = state
    client = connect(fake.target, retry=retry)

    with pytest.raises(Unavailable) as caught:
        begin(client)

    assert (caught.value.reason, caught.value.retry_after) == (reason, 0.05)
    assert caught.value.request_id
    assert retry.attempts is not None
    assert 1 <= refused(fake) <= retry.attempts


@begins
def test_a_call_waits_for_a_loading_server(
    connect: Connect, fake: FakeServer, begin: Begin
) -> None:
    fake.state = ServerState.LOADING
    client = connect(fake.target)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(begin, client)
        fake.wait_for(lambda: refused(fake) > 0)
        fake.state = ServerState.READY
        assert asking.result(60)

    assert len(fake.jobs) == 1


@begins
def test_a_recovering_server_accepts_jobs(connect: Connect, fake: FakeServer, begin: Begin) -> None:
    fake.state = ServerState.RECOVERING

    assert begin(connect(fake.target, retry=ONCE))


@pytest.mark.parametrize("retry", [ONCE, SOON])
@pytest.mark.parametrize("refuse", [True, False])
def test_a_server_that_accepts_jobs_despite_its_health_runs_them(
    connect: Connect, server: ScriptedServer, retry: Retry, refuse: bool
) -> None:
    server.ready, server.refuse_health = False, refuse
    client = connect(server.address, retry=retry)

    assert client.generate("a star").images
    assert len(server.requests) == 1


@pytest.mark.parametrize("retry", [ONCE, SOON])
def test_a_server_without_health_checks_accepts_jobs(connect: Connect, retry: Retry) -> None:
    methods = {
        "Generate": grpc.unary_unary_rpc_method_handler(
            respond,
            request_deserializer=generation_pb2.GenerateRequest.FromString,
            response_serializer=generation_pb2.GenerateResponse.SerializeToString,
        )
    }
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, options=(("grpc.so_reuseport", 0),))
        handlers = grpc.method_handlers_generic_handler(SERVICE, methods)
        server.add_generic_rpc_handlers((handlers,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        client = connect(f"127.0.0.1:{port}", retry=retry)
        assert [client.generate("a star", seed=7).images[0].seed for _ in range(2)] == [7, 7]
        server.stop(None).wait()


@begins
@pytest.mark.parametrize("retry", [ONCE, SOON])
def test_the_error_names_a_server_that_is_down(
    connect: Connect, begin: Begin, retry: Retry
) -> None:
    with FakeServer() as gone:
        pass
    client = connect(gone.target, retry=retry)

    with pytest.raises(Unavailable) as caught:
        begin(client)

    assert f"no Darkroom server answers at {gone.target}" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert (caught.value.reason, caught.value.retry_after) == ("", None)


def test_both_job_channels_share_one_connection(connect: Connect, server: ScriptedServer) -> None:
    client = connect(server.address)

    client.generate("a star")
    server.script.append(fail(grpc.StatusCode.UNAVAILABLE))
    client.generate("a star")

    assert len(server.requests) == 3
    assert len(server.peers) == 1

    client.models()
    client.model("demo")
    assert len(server.peers) == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_lost_call_is_retried_unless_retries_are_off(
    connect: Connect, server: ScriptedServer, code: grpc.StatusCode
) -> None:
    server.script.append(fail(code))
    connect(server.address, retry=SOON).generate("a star", request_id="r-1")
    assert [request.request_id for request in server.requests] == ["r-1"] * 2

    server.script.append(fail(code))
    with pytest.raises(Exception, match="no"):
        connect(server.address, retry=ONCE).generate("a star")
    assert len(server.requests) == 3


def test_both_channels_together_make_the_allowed_number_of_tries(
    connect: Connect, server: ScriptedServer
) -> None:
    for attempts in (1, 2, 3):
        server.requests.clear()
        server.script.extend([fail(grpc.StatusCode.UNAVAILABLE, "DRAINING")] * 3)
        with pytest.raises(Unavailable):
            connect(
                server.address,
                retry=Retry(attempts=attempts, initial_backoff=0.01, max_backoff=0.01),
            ).generate("a star")
        server.script.clear()

        assert len(server.requests) == attempts


def test_a_server_can_forbid_a_retry(connect: Connect, server: ScriptedServer) -> None:
    def forbid(request: generation_pb2.GenerateRequest, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "-1"),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "never again")

    server.script.append(forbid)

    with pytest.raises(Unavailable, match="never again"):
        connect(server.address, retry=SOON).generate("a star")
    assert len(server.requests) == 1
