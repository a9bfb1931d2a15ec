"""Servers that are full, loading, restarting or down: batches, retries, errors and the log."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from darkroom_client import (
    TLS,
    DeadlineExceeded,
    DeadlineUnreachable,
    GenerationResult,
    Overloaded,
    QuotaExceeded,
    Reconnecting,
    Retry,
    ServerState,
    TLSError,
    Unavailable,
)
from darkroom_client._protocol.pacing import BatchPacer, is_not_now
from darkroom_client.testing import Behaviour, FakeServer
from tests.client.conftest import Connect
from tests.client.scripted import ScriptedServer
from tests.client.test_connection import certificate, self_signed

__all__ = ["certificate"]

SOON = Retry(initial_backoff=0.01, max_backoff=0.05)
MANY_TRIES = 30


class FailedTries(logging.Handler):
    """Counts the failed tries that are followed by another one; they are logged before the wait."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._count = 0
        self._counted = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        if "failed (" in record.getMessage():
            with self._counted:
                self._count += 1
                self._counted.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until ``count`` tries have failed."""
        with self._counted:
            assert self._counted.wait_for(lambda: self._count >= count, 60)


@pytest.fixture
def failed_tries(caplog: pytest.LogCaptureFixture) -> Iterator[FailedTries]:
    """The failed tries of all clients."""
    handler, logger = FailedTries(), logging.getLogger("darkroom_client")
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


# A batch at a server that is full.


@pytest.mark.parametrize("concurrency", [8, 40])
def test_a_batch_waits_out_a_full_queue(connect: Connect, concurrency: int) -> None:
    with FakeServer(capacity=3) as full:
        full.script(default=Behaviour(step_seconds=0.005))
        answers = connect(full.target).generate_many(
            [f"star {i}" for i in range(40)], concurrency=concurrency
        )
        rejections = full._registry.rejections.total()

    assert [type(answer) for answer in answers] == [GenerationResult] * 40
    prompts = [answer.images[0].replay.request.prompt for answer in answers]
    assert prompts == [f"star {i}" for i in range(40)]
    # It was full; and the batch adapted, rather than trying all the time.
    assert 0 < rejections < 3 * 40


@pytest.mark.parametrize(
    "error",
    [
        QuotaExceeded("no more jobs"),
        DeadlineUnreachable(
            "too long a queue",
            retry_after=0.05,
            metadata={"estimate_seconds": "90", "queue_wait_seconds": "80"},
        ),
    ],
)
def test_a_batch_waits_out_a_quota_and_an_unreachable_deadline(
    caller: Any, fake: FakeServer, error: Exception
) -> None:
    fake.script(Behaviour(), *[Behaviour(error=error)] * 4)  # type: ignore[arg-type]

    answers = caller.generate_many(["one", "two", "three", "four"], timeout=30.0)

    assert [type(answer) for answer in answers] == [GenerationResult] * 4


def test_a_batch_waits_for_retry_after_or_until_one_of_its_own_ends(
    caller: Any, fake: FakeServer
) -> None:
    held = threading.Event()
    full = Behaviour(error=Overloaded("full", retry_after=60.0))
    fake.script(Behaviour(hold=held), full, full)
    timer = threading.Timer(0.5, held.set)
    timer.start()

    began = time.monotonic()
    answers = caller.generate_many(["one", "two", "three"])
    timer.join()

    assert [type(answer) for answer in answers] == [GenerationResult] * 3
    assert time.monotonic() - began < 30


def test_a_batch_at_a_server_that_stays_full_ends_with_the_reason(
    caller: Any, fake: FakeServer
) -> None:
    fake.script(default=Behaviour(error=Overloaded("full", retry_after=60.0)))

    began = time.monotonic()
    answers = caller.generate_many(["one", "two"], timeout=0.5)

    assert [type(answer) for answer in answers] == [Overloaded] * 2
    assert 0.5 <= time.monotonic() - began < 20


def test_without_retries_a_batch_does_not_wait(connect: Connect, fake: FakeServer) -> None:
    fake.script(Behaviour(error=Overloaded("full", retry_after=60.0)))

    (answer,) = connect(fake.target, retry=Retry(attempts=1)).generate_many(["one"])

    assert isinstance(answer, Overloaded)


def test_the_end_of_the_loop_ends_a_batch_that_waits(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(), default=Behaviour(error=Overloaded("full", retry_after=60.0)))
    answers = caller.generate_as_completed(["one", "two"], concurrency=1)

    began = time.monotonic()
    next(answers)
    answers.close()

    assert time.monotonic() - began < 20


def test_the_pacer_finds_what_the_server_holds() -> None:
    pacer = BatchPacer(300, None, Retry())
    for _ in range(300):
        assert pacer.wait() == 0
        pacer.started()
    full = Overloaded("full", retry_after=5.0)
    for _ in range(240):
        assert pacer.ended(full)

    # 60 are at the server: one may try in five seconds.
    assert 4 < (pacer.wait() or 0) <= 5
    # Or when one of them ends.
    pacer.ended()
    assert pacer.wait() == 0
    pacer.started()
    assert pacer.wait() is None


def test_the_pause_of_the_pacer_doubles_without_advice_of_the_server() -> None:
    pacer, pauses = BatchPacer(1, None, Retry()), []
    for _ in range(6):
        pacer.started()
        assert pacer.ended(QuotaExceeded("no more jobs"))
        pauses.append(pacer.wait())

    # 20 % more or less; a little time has passed.
    for pause, expected in zip(pauses, [0.5, 1.0, 2.0, 4.0, 5.0, 5.0], strict=True):
        assert pause == pytest.approx(expected, rel=0.25)


def test_a_deadline_that_the_request_alone_does_not_meet_is_final() -> None:
    def unreachable(estimate: float, queue: float) -> DeadlineUnreachable:
        return DeadlineUnreachable(
            "too long",
            metadata={"estimate_seconds": str(estimate), "queue_wait_seconds": str(queue)},
        )

    assert is_not_now(unreachable(30, 25), 10.0)
    assert not is_not_now(unreachable(30, 5), 10.0)
    assert not is_not_now(DeadlineExceeded("late", reason="DEADLINE_EXPIRED"), 10.0)


# Servers that load, restart, or are down.


def stream(client: Any, **options: Any) -> Any:
    with client.stream("a star", **options) as events:
        return events.result()


def batch(client: Any, **options: Any) -> Any:
    (answer,) = client.generate_many(["a star"], **options)
    if isinstance(answer, Exception):
        raise answer
    return answer


VERBS: dict[str, Callable[..., Any]] = {
    "generate": lambda client, **options: client.generate("a star", **options),
    "generate_many": batch,
    "stream": stream,
    "submit": lambda client, **options: client.submit("a star", **options),
    "status": lambda client, **options: client.status(**options),
    "models": lambda client, **options: client.models(**options),
    "model": lambda client, **options: client.model(**options),
    "estimate": lambda client, **options: client.estimate("a star", **options),
}
verbs = pytest.mark.parametrize("verb", VERBS)


@pytest.mark.parametrize("verb", ["generate", "generate_many", "stream", "submit"])
def test_no_number_of_tries_ends_a_call_to_a_loading_server(
    connect: Connect, fake: FakeServer, verb: str
) -> None:
    fake.state = ServerState.LOADING
    client = connect(fake.target)

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(VERBS[verb], client)
        fake.wait_for(lambda: fake._registry.rejections.total() > 12)
        fake.state = ServerState.READY
        assert calling.result(60)


@verbs
def test_every_verb_survives_a_restart_that_outlasts_many_tries(
    connect: Connect, failed_tries: FailedTries, verb: str
) -> None:
    with FakeServer() as gone:
        port = int(gone.target.rpartition(":")[2])
        client = connect(gone.target, retry=Retry(initial_backoff=0.01, max_backoff=0.01))
        client.status()
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(VERBS[verb], client)
        failed_tries.wait_for(MANY_TRIES)
        assert not calling.done()
        with FakeServer(port=port):
            assert calling.result(60)


def errors_of_all_verbs(
    connect: Connect, target: str, timeout: float
) -> dict[str, BaseException | None]:
    """The error of each verb, all called at once, each with a client of its own."""
    with ThreadPoolExecutor(len(VERBS)) as pool:
        calls = {
            verb: pool.submit(call, connect(target), timeout=timeout)
            for verb, call in VERBS.items()
        }
        return {verb: call.exception(timeout + 60) for verb, call in calls.items()}


@verbs
@pytest.mark.parametrize("timeout", [0.05, 0.4])
def test_a_server_that_is_down_is_reported_as_down_for_a_short_timeout(
    connect: Connect, verb: str, timeout: float
) -> None:
    with FakeServer() as gone:
        pass
    client = connect(gone.target)

    began = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        VERBS[verb](client, timeout=timeout)

    assert f"no Darkroom server answers at {gone.target}" in str(caught.value)
    assert time.monotonic() - began < timeout + 10


def test_a_server_that_is_down_is_reported_as_down_for_a_longer_timeout(connect: Connect) -> None:
    timeout = 1.5
    with FakeServer() as gone:
        pass

    began = time.monotonic()
    errors = errors_of_all_verbs(connect, gone.target, timeout)

    assert time.monotonic() - began < timeout + 10
    for verb, error in errors.items():
        assert type(error) is Unavailable, verb
        assert f"no Darkroom server answers at {gone.target}" in str(error), verb


def test_a_server_that_never_completes_a_connection_is_reported_as_down(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        errors = errors_of_all_verbs(connect, target, 0.5)

    for verb, error in errors.items():
        assert type(error) is Unavailable, verb
        assert "no connection within 0.5 s" in str(error), verb


@pytest.mark.parametrize("verb", ["generate", "stream"])
def test_a_server_that_works_too_long_is_not_reported_as_down(
    connect: Connect, fake: FakeServer, verb: str
) -> None:
    fake.script(default=Behaviour(hold=threading.Event()))
    client = connect(fake.target)
    client.status()

    with pytest.raises(DeadlineExceeded):
        VERBS[verb](client, timeout=0.5)


@pytest.mark.parametrize("verb", ["generate", "generate_many", "stream", "status"])
def test_closing_the_client_ends_a_wait_between_two_tries(
    connect: Connect, fake: FakeServer, failed_tries: FailedTries, verb: str
) -> None:
    if verb == "status":
        with FakeServer() as gone:
            target = gone.target
        client = connect(target, retry=Retry(initial_backoff=60.0, max_backoff=60.0))
    else:
        loading = Unavailable("loading", reason="MODEL_LOADING", retry_after=60.0)
        fake.script(default=Behaviour(error=loading))
        client = connect(fake.target)

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(VERBS[verb], client)
        failed_tries.wait_for(1)
        began = time.monotonic()
        client.close()
        with pytest.raises(Exception, match="closed"):
            calling.result(60)

    assert time.monotonic() - began < 20


# What a caller sees of it.


def test_a_stream_that_ends_says_how_far_it_was(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(step_seconds=0.2))
    caller.status()

    with (
        caller.stream("a star", steps=50, image_count=2, timeout=1.0) as events,
        pytest.raises(DeadlineExceeded) as caught,
    ):
        list(events)

    assert " of 50; 0 of 2 images had arrived" in str(caught.value)
    assert "the job was at step " in str(caught.value)


def test_a_stream_whose_server_stays_down_says_so_and_how_far_it_was(connect: Connect) -> None:
    with FakeServer() as fake:
        client = connect(fake.target, retry=SOON)
        fake.script(Behaviour(step_seconds=0.05))
        client.status()
        events = client.stream("a star", steps=50, timeout=1.5)
        events.__enter__()
        while type(next(events)).__name__ != "Progress":
            pass
    with pytest.raises(Unavailable) as caught:
        list(events)
    events.close()

    assert "no Darkroom server answers" in str(caught.value)
    assert "the job was at step " in str(caught.value)


def test_a_stream_emits_each_reconnection_before_it_waits(connect: Connect) -> None:
    loading = Unavailable("loading", reason="MODEL_LOADING", retry_after=0.3)
    with FakeServer() as fake:
        fake.script(Behaviour(error=loading), Behaviour(error=loading))
        with connect(fake.target).stream("a star") as events:
            began = time.monotonic()
            first = next(events)
            waited = time.monotonic() - began
            rest = list(events)

    assert first == Reconnecting(attempt=1, reason="MODEL_LOADING")
    assert rest[0] == Reconnecting(attempt=2, reason="MODEL_LOADING")
    assert time.monotonic() - began >= 0.6 > waited


def test_retries_are_logged_at_info_and_calls_at_debug(
    caller: Any, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "darkroom_client")
    fake.script(Behaviour(error=Unavailable("loading", reason="MODEL_LOADING", retry_after=0.01)))

    caller.generate("a star", request_id="r-1")

    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    retries = [text for level, text in lines if level == "INFO"]
    calls = [text for level, text in lines if level == "DEBUG"]
    assert len(retries) == 1
    assert "Generate failed (MODEL_LOADING), try 2 in 0.01 s, request id r-1" in retries[0]
    assert any("call Generate, request id r-1" in text for text in calls)


# TLS.


@pytest.fixture
def encrypted(certificate: tuple[Path, Path]) -> Iterator[Callable[[bool], str]]:
    """Starts a TLS server, with or without client certificates; returns its address."""
    cert, key = certificate
    servers = []

    def start(mutual: bool) -> str:
        credentials = grpc.ssl_server_credentials(
            [(key.read_bytes(), cert.read_bytes())],
            cert.read_bytes() if mutual else None,
            require_client_auth=mutual,
        )
        servers.append(ScriptedServer(credentials=credentials).__enter__())
        return servers[-1].address

    yield start
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def other_certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of another authority."""
    return self_signed(tmp_path_factory.mktemp("other"))


@pytest.mark.parametrize("verb", ["generate", "generate_many", "stream", "models"])
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("authority", "is not signed by an authority in"),
        ("name", "set server_name to a name that is in it"),
        ("no client certificate", "it requires a client certificate"),
        ("client certificate", "does not accept the client certificate"),
        ("no tls", "does not speak TLS"),
    ],
)
def test_a_tls_mistake_is_reported_as_what_it_is_after_one_try(
    connect: Connect,
    server: ScriptedServer,
    encrypted: Callable[[bool], str],
    certificate: tuple[Path, Path],
    other_certificate: tuple[Path, Path],
    mistake: str,
    words: str,
    verb: str,
) -> None:
    (cert, _), (other, other_key), name = certificate, other_certificate, "darkroom.test"
    tls = {
        "authority": TLS(ca=other, server_name=name),
        "name": TLS(ca=cert),
        "no client certificate": TLS(ca=cert, server_name=name),
        "client certificate": TLS(ca=cert, server_name=name, cert=other, key=other_key),
        "no tls": TLS(ca=cert, server_name=name),
    }[mistake]
    address = server.address if mistake == "no tls" else encrypted("client" in mistake)

    began = time.monotonic()
    with pytest.raises(TLSError, match=words):
        VERBS[verb](connect(address, tls=tls, token="secret"))

    # The timeout is two minutes.
    assert time.monotonic() - began < 30
