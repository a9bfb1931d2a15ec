"""Streams and clients that are closed while in use: nothing hangs, and every job is cancelled."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from darkroom_client import Cancelled, Client, GenerationRequest, Unavailable
from darkroom_client._protocol.retries import NextCall
from darkroom_client.testing import Behaviour, FakeServer, JobState
from tests.client.conftest import Connect

SECONDS = 60.0
HELD = Behaviour(hold=threading.Event())
STAR = GenerationRequest(prompt="a star")


def cancelled(fake: FakeServer) -> list[bool]:
    return [job.state is JobState.CANCELLED for job in fake.jobs]


def test_close_ends_a_read_in_another_thread(caller: Any, fake: FakeServer) -> None:
    fake.script(HELD)

    with ThreadPoolExecutor(1) as reader, caller.stream("a star") as stream:
        next(stream)
        reading = reader.submit(list, stream)
        stream.close()
        with pytest.raises((Cancelled, RuntimeError)):
            reading.result(SECONDS)

    fake.wait_for(lambda: all(cancelled(fake)), SECONDS)


def notifying(make: Callable[..., Any], event: threading.Event) -> Callable[..., Any]:
    """Wrap ``make``: set ``event`` after each call."""

    def made(*args: Any, **options: Any) -> Any:
        result = make(*args, **options)
        event.set()
        return result

    return made


def test_close_ends_the_wait_before_a_retry(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(error=Unavailable("loading", retry_after=3600.0)))
    stream = caller.stream("a star", timeout=7200.0)
    waits = threading.Event()
    session = getattr(stream, "_stream", stream)._session
    session.on_call_ended = notifying(session.on_call_ended, waits)

    with ThreadPoolExecutor(1) as reader, stream:
        reading = reader.submit(list, stream)
        assert waits.wait(SECONDS)
        stream.close()
        with pytest.raises(RuntimeError, match="closed before its end"):
            reading.result(SECONDS)

    assert fake.jobs == ()


def test_a_job_that_begins_while_its_stream_is_closed_is_cancelled(fake: FakeServer) -> None:
    fake.script(HELD)
    with Client(fake.target) as client, client.stream("a star") as stream:
        next_call = stream._session.next_call

        def left_meanwhile() -> NextCall:
            attempt = next_call()

            def method(stubs: Any) -> Any:
                # The cancel call is made, and finds no job.
                stream.close()
                for cancel in tuple(client._transport._cancels):
                    cancel.join(SECONDS)

                def opened(*args: Any, **options: Any) -> Any:
                    call = attempt.method(stubs)(*args, **options)
                    fake.wait_for(lambda: len(fake.jobs) == 1, SECONDS)
                    return call

                return opened

            return replace(attempt, method=method)

        stream._session.next_call = left_meanwhile  # type: ignore[method-assign]
        with pytest.raises(Cancelled):
            next(stream)

        fake.wait_for(lambda: all(cancelled(fake)), SECONDS)


def test_a_job_that_begins_while_its_call_is_cancelled_is_cancelled(fake: FakeServer) -> None:
    fake.script(Behaviour(error=Unavailable("loading", retry_after=0.01)), HELD)
    with Client(fake.target) as client:
        transport, call = client._transport, client._calls.generate(STAR, None, None)
        in_flight = transport.start(call)
        open_try = transport.open

        def cancelled_meanwhile(*retry: Any) -> Any:
            in_flight.cancel()
            # The cancel call is made, and finds no job.
            for thread in tuple(transport._cancels):
                thread.join(SECONDS)
            future = open_try(*retry)
            fake.wait_for(lambda: len(fake.jobs) == 1, SECONDS)
            return future

        transport.open = cancelled_meanwhile  # type: ignore[method-assign, assignment]
        with pytest.raises(Cancelled):
            in_flight.result()

        fake.wait_for(lambda: cancelled(fake) == [True], SECONDS)


def test_a_close_that_interrupts_the_start_of_a_cancel_cancels_the_job(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.script(HELD)
    client = Client(fake.target)
    stream = client.stream("a star").__enter__()
    next(stream)
    start = threading.Thread.start
    closes = [client.close]

    def interrupted(thread: threading.Thread) -> None:
        # As a signal handler does, on the same thread.
        while closes:
            closes.pop()()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    stream.close()

    assert cancelled(fake) == [True]
    for thread in tuple(client._transport._cancels):
        thread.join(SECONDS)


@pytest.mark.parametrize("first", ["streams", "client"])
def test_a_closed_client_has_cancelled_every_job(
    connect: Connect, fake: FakeServer, first: str
) -> None:
    fake.script(default=HELD)
    client = connect(fake.target)
    streams = [client.stream("a star").__enter__() for _ in range(16)]
    for stream in streams:
        next(stream)
    closes = [stream.close for stream in streams]

    with ThreadPoolExecutor(17) as pool:
        at_once = [*closes, client.close] if first == "streams" else [client.close, *closes]
        done = [pool.submit(close) for close in at_once]
        for each in done:
            each.result(SECONDS)

    assert cancelled(fake) == [True] * 16
    assert not client._transport._in_flight
    assert not client._transport._cancels


def test_a_cancel_call_to_a_stopped_server_ends(connect: Connect) -> None:
    with FakeServer() as fake:
        fake.script(HELD)
        client = connect(fake.target)
        stream = client.stream("a star").__enter__()
        next(stream)
    stream.close()
    client.close()

    assert not client._transport._cancels


def test_a_call_on_a_channel_closed_meanwhile_is_cancelled(fake: FakeServer) -> None:
    client = Client(fake.target)
    stream = client.stream("a star").__enter__()
    client.close()
    client._transport.check_open = lambda: None  # type: ignore[method-assign]

    with pytest.raises(Cancelled):
        client.generate("a star")
    with pytest.raises(Cancelled):
        next(stream)


def test_to_see_whether_a_client_is_connected_leaves_no_thread(fake: FakeServer) -> None:
    """A thread of gRPC that watches a channel fails if the channel is closed meanwhile."""
    with Client(fake.target) as client:
        transport = client._transport
        assert not transport.connected
        client.models()
        before = set(threading.enumerate())
        assert transport.connected
        assert set(threading.enumerate()) <= before
    assert not transport.connected
