"""Several addresses: jobs go to the server with less work, calls about a job to its own."""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from darkroom.v1 import generation_pb2
from darkroom_client import Client, GenerationRequest, JobState, ServerState, Unavailable
from darkroom_client._protocol import balancing
from darkroom_client._protocol.balancing import Balancer, reported_backlog
from darkroom_client.testing import Behaviour, FakeServer, fake_model
from tests.client.conftest import Connect

JOBS = 24
MODELS = [fake_model(optional_fields=("image", "strength"))]

Two = tuple[FakeServer, FakeServer]


@pytest.fixture
def two() -> Iterator[Two]:
    with FakeServer(models=MODELS) as one, FakeServer(models=MODELS) as other:
        yield one, other


def targets(two: Two) -> list[str]:
    return [server.target for server in two]


def jobs(two: Two) -> list[int]:
    return [len(server.jobs) for server in two]


@pytest.mark.parametrize("busy", [0, 1])
def test_the_server_with_less_work_gets_the_jobs(connect: Connect, two: Two, busy: int) -> None:
    two[busy].backlog = 60.0
    client = connect(targets(two))

    for _ in range(JOBS):
        client.submit("a star")

    # Only until it has reported, and a report may come after the next call began.
    assert jobs(two)[busy] <= 4
    assert sum(jobs(two)) == JOBS


def test_without_reports_the_servers_get_equally_many(connect: Connect, two: Two) -> None:
    for server in two:
        server.backlog = None
    client = connect(targets(two))

    for _ in range(JOBS):
        client.submit("a star")

    assert jobs(two) == [JOBS / 2, JOBS / 2]


def test_the_jobs_follow_the_load(connect: Connect, two: Two) -> None:
    client = connect(",".join(targets(two)))
    two[0].backlog = 2.0
    for _ in range(JOBS):
        client.generate("a star")
    before = jobs(two)
    two[1].backlog = 120.0
    for _ in range(JOBS):
        client.generate("a star")
    after = jobs(two)

    assert before[1] > before[0]
    # The other one reported two seconds of work and three are a multiple of that.
    assert after[0] - before[0] > after[1] - before[1]


def test_a_burst_is_shared_before_any_report(connect: Connect, two: Two) -> None:
    released = threading.Event()
    for server in two:
        server.script(default=Behaviour(hold=released))
    client = connect(targets(two))

    with ThreadPoolExecutor(JOBS) as pool:
        answers = [pool.submit(client.generate, "a star") for _ in range(JOBS)]
        for server in two:
            server.wait_for(lambda server=server: len(server.jobs) == JOBS / 2)  # type: ignore[misc]
        released.set()
        assert all(answer.result().images for answer in answers)


def test_calls_about_a_job_go_to_its_server(connect: Connect, two: Two) -> None:
    released = threading.Event()
    for server in two:
        server.script(default=Behaviour(hold=released))
    client = connect(targets(two))

    accepted = [client.submit("a star").request_id for _ in range(8)]
    assert min(jobs(two)) > 0
    for request_id in accepted:
        assert client.job(request_id).state is JobState.RUNNING
    for request_id in accepted[4:]:
        assert client.cancel(request_id)
    released.set()
    for request_id in accepted[:4]:
        assert client.result(request_id).images


def test_the_same_id_is_one_job(connect: Connect, two: Two) -> None:
    client = connect(targets(two))

    for _ in range(4):
        assert client.submit("a star", request_id="mine", seed=7).request_id == "mine"

    assert sum(jobs(two)) == 1


def test_a_rejected_job_may_go_to_another_server(connect: Connect) -> None:
    with FakeServer(capacity=1) as full, FakeServer() as other:
        released = threading.Event()
        full.script(default=Behaviour(hold=released))
        connect(full.target).submit("a star")
        client = connect([full.target, other.target])
        answers = client.generate_many(["a star"] * 6)
        released.set()

    assert not [answer for answer in answers if isinstance(answer, Exception)]
    assert len(other.jobs) == 6


def test_a_stranger_finds_a_job_by_trying(connect: Connect, two: Two) -> None:
    accepted = connect(two[1].target).submit("a star").request_id

    assert connect(targets(two)).result(accepted).images


def test_an_image_goes_to_the_server_that_gets_the_job(
    connect: Connect, two: Two, noise: bytes
) -> None:
    client = connect(targets(two))

    for seed in range(4):
        client.submit("a star", image=noise + bytes([seed]), seed=seed)

    for server in two:
        assert len(server.uploads) == len(server.jobs)
    assert sum(jobs(two)) == 4


@pytest.fixture
def noise() -> bytes:
    """Bytes that begin as a PNG does, and are too many for a request."""
    return b"\x89PNG\r\n\x1a\n" + bytes(2**20)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_server_that_is_down_gets_no_job(connect: Connect, two: Two, gone: int) -> None:
    with FakeServer() as dead:
        pass
    addresses = targets(two)[:1]
    addresses.insert(gone, dead.target)
    client = connect(addresses)

    client.wait_until_ready(60)
    for _ in range(8):
        assert client.generate("a star").images
    assert len(client.models()) == 1
    assert len(two[0].jobs) == 8


def test_a_draining_server_gets_no_job(connect: Connect, two: Two) -> None:
    two[0].state = ServerState.DRAINING
    client = connect(targets(two))

    for _ in range(8):
        assert client.generate("a star").images
    assert jobs(two) == [0, 8]


def test_the_error_names_every_server(connect: Connect) -> None:
    with FakeServer() as one, FakeServer() as other:
        addresses = [one.target, other.target]
    client = connect(addresses)

    with pytest.raises(Unavailable, match=",".join(addresses)):
        client.generate("a star", timeout=1)


def test_a_stream_goes_on_at_its_server_after_a_lost_connection(connect: Connect, two: Two) -> None:
    for server in two:
        server.script(default=Behaviour(drop_at_step=1))
    client = connect(targets(two))

    with client.stream("a star") as events:
        assert events.result().images
    assert sum(jobs(two)) == 1


def test_the_variable_names_several_servers(monkeypatch: pytest.MonkeyPatch, two: Two) -> None:
    monkeypatch.setenv("DARKROOM_TARGET", ",".join(targets(two)))
    for server in two:
        server.backlog = None

    with Client() as client:
        answers = client.generate_many([GenerationRequest(prompt="a star")] * 4)

    assert len(answers) == 4
    assert jobs(two) == [2, 2]


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ([], "empty list"),
        (["one:1", "dns:///other:2"], "write each server as host:port"),
        (["one:1", "other"], "names no port"),
        ("one:1,other", "names no port"),
        ("one:1,", "names no port"),
    ],
)
def test_what_cannot_be_several_servers_is_an_error(target: str | list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Client(target)


def report(seconds: float) -> list[tuple[str, str]]:
    return [("other", ""), (balancing.BACKLOG_KEY, f"{seconds:.3f}")]


def chosen(balancer: Balancer, count: int = 1) -> list[int]:
    """The servers of new jobs."""
    return [
        balancer.choose("Generate", generation_pb2.GenerateRequest(request_id=uuid.uuid4().hex))
        for _ in range(count)
    ]


def test_a_report_grows_old() -> None:
    now = 1000.0
    balancer = Balancer(2, lambda: now)
    balancer.answered(0, report(30.0))
    balancer.answered(1, report(10.0))
    assert chosen(balancer) == [1]
    balancer.answered(1, report(29.0))
    now += 25.0
    balancer.answered(1, report(10.0))
    assert chosen(balancer) == [0]


def test_the_better_of_two_is_random_among_more() -> None:
    balancer = Balancer(4)
    for server, seconds in enumerate((0.0, 50.0, 100.0, 150.0)):
        balancer.answered(server, report(seconds))
    got = set()
    for _ in range(200):
        (server,) = chosen(balancer)
        got.add(server)
        balancer.answered(server, report(50.0 * server))
    assert got == {0, 1, 2}


def test_a_server_that_failed_is_tried_again_later() -> None:
    now = 1000.0
    balancer = Balancer(2, lambda: now)
    balancer.unavailable(0, "Generate", (), found=False)
    assert chosen(balancer, 3) == [1, 1, 1]
    now += balancing.AVOIDED_SECONDS + 0.1
    assert chosen(balancer) == [0]
    balancer.unavailable(0, "Generate", (), found=False)
    balancer.unavailable(1, "Generate", (), found=False)
    assert set(chosen(balancer, 20)) == {0, 1}


def test_a_repeated_request_goes_back_once_after_a_lost_connection() -> None:
    balancer = Balancer(2)
    request = generation_pb2.GenerateRequest(request_id="a")
    watch = generation_pb2.WatchGenerationRequest(request_id="a")
    place = balancer.choose("Generate", request)
    balancer.unavailable(place, "Generate", (), found=True)
    assert balancer.choose("Generate", request) == place
    assert balancer.choose("WatchGeneration", watch) == place
    balancer.unavailable(place, "WatchGeneration", (), found=False)
    assert balancer.choose("Generate", request) == 1 - place


def test_a_server_that_rejects_new_jobs_is_asked_about_its_own() -> None:
    balancer = Balancer(2)
    request = generation_pb2.GenerateRequest(request_id="a")
    watch = generation_pb2.WatchGenerationRequest(request_id="a")
    place = balancer.choose("Generate", request)
    for trailers in ((), [(balancing.DETAILS_KEY, b"")]):
        balancer.unavailable(place, "Generate", trailers, found=bool(trailers))
        assert balancer.choose("WatchGeneration", watch) == place
        assert chosen(balancer, 4) == [1 - place] * 4


def test_a_report_that_cannot_be_read_does_not_count() -> None:
    assert reported_backlog(report(2.5)) == 2.5
    assert reported_backlog([]) is None
    for wrong in ("", "much", "nan", "inf"):
        assert reported_backlog([(balancing.BACKLOG_KEY, wrong)]) is None


def test_the_places_of_jobs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "MAX_PLACES", 2)
    balancer = Balancer(2)
    place = {}
    for name in "abc":
        request = generation_pb2.GenerateRequest(request_id=name)
        place[name] = balancer.choose("Generate", request)
    watches = [generation_pb2.WatchGenerationRequest(request_id=name) for name in "bc"]
    assert [balancer.choose("WatchGeneration", each) for each in watches] == [
        place["b"],
        place["c"],
    ]
    unknown = generation_pb2.WatchGenerationRequest(request_id="a")
    assert {balancer.choose("WatchGeneration", unknown) for _ in range(2)} == {0, 1}
