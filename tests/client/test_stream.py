"""Streams, through both clients and the real wire."""

import os
import signal
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import pytest

from darkroom.v1 import generation_pb2
from darkroom_client import (
    Accepted,
    Cancelled,
    DeadlineExceeded,
    Finished,
    FinishReason,
    GenerationFailed,
    GenerationRequest,
    ImageReady,
    InvalidRequest,
    Overloaded,
    Preview,
    Progress,
    Queued,
    Reconnecting,
    Restarted,
    Retry,
    ServerState,
    Started,
    Unavailable,
    UnknownRequest,
)
from darkroom_client.testing import Behaviour, FakeServer, JobState
from tests.client.conftest import Connect
from tests.client.scripted import ScriptedServer, respond


def kinds(events: list[Any]) -> list[str]:
    """The names of the events, without repetitions in a row."""
    names = [type(event).__name__ for event in events]
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


def test_the_events_of_a_job_from_start_to_end(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(queue=2))

    with caller.stream(
        "a star", seed=7, steps=4, image_count=2, width=200, height=200, preview_every=4
    ) as stream:
        events = list(stream)

    assert kinds(events) == [
        "Accepted",
        "Queued",
        "Started",
        "Progress",
        "Preview",
        "Progress",
        "Preview",
        "ImageReady",
        "Finished",
    ]
    accepted, *rest = events
    assert isinstance(accepted, Accepted)
    assert (accepted.seeds, accepted.queue_position, accepted.joined) == ((7, 8), 2, False)
    assert accepted.request_id == stream.request_id
    assert [event.position for event in rest if isinstance(event, Queued)] == [2, 1]
    steps = [(e.image_index, e.step, e.steps) for e in rest if isinstance(e, Progress)]
    assert steps == [(index, step, 4) for step in range(1, 5) for index in (0, 1)]
    previews = [event for event in rest if isinstance(event, Preview)]
    assert [(preview.image_index, preview.step) for preview in previews] == [(0, 4), (1, 4)]
    assert previews[0].data.startswith(b"\xff\xd8")  # JPEG
    finished = rest[-1]
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.COMPLETED
    images = [event.image for event in rest if isinstance(event, ImageReady)]
    assert finished.result.images == tuple(images)
    # However the server cuts the chunks, the image equals that of a unary call.
    assert images[0].data == caller.generate("a star", seed=7, width=200, height=200).images[0].data
    assert stream.result() is finished.result


def test_a_request_in_place_of_a_prompt(caller: Any, fake: FakeServer) -> None:
    request = GenerationRequest(prompt="a star", seed=7, steps=2)

    with caller.stream(request, steps=3) as stream:
        assert stream.result().images[0].seed == 7
    assert caller.generate(request).images[0].seed == 7

    assert [sent.steps for sent in fake.requests] == [3, 2]


def test_a_stream_is_a_context_manager(caller: Any, fake: FakeServer) -> None:
    stream = caller.stream("a star")

    with pytest.raises(RuntimeError, match="is a context"):
        next(iter(stream))
    assert fake.jobs == ()


def test_an_early_end_frees_the_server_within_one_step(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(step_seconds=0.05))

    with caller.stream("a star", steps=1000) as stream:
        for event in stream:
            if isinstance(event, Progress) and event.step == 3:
                break
    fake.wait_for(lambda: fake.jobs[0].state is not JobState.RUNNING)

    assert fake.jobs[0].state is JobState.CANCELLED
    assert fake.jobs[0].steps_done < 1000
    with pytest.raises(RuntimeError, match="closed before its end"):
        next(iter(stream))


def test_an_error_in_the_block_cancels_the_job(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(hold=threading.Event()))

    def use() -> None:
        with caller.stream("a star") as stream:
            next(iter(stream))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()

    fake.wait_for(lambda: fake.jobs[0].state is JobState.CANCELLED)


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(error=InvalidRequest("no such size")), InvalidRequest),
        (Behaviour(error=Overloaded("full", retry_after=2.5)), Overloaded),
        (Behaviour(error=GenerationFailed("black"), error_at_step=2), GenerationFailed),
    ],
)
def test_the_error_of_the_server_is_raised(
    caller: Any, fake: FakeServer, behaviour: Behaviour, kind: type[Exception]
) -> None:
    fake.script(behaviour)

    with caller.stream("a star") as stream, pytest.raises(kind) as caught:
        list(stream)

    assert caught.value.request_id == stream.request_id  # type: ignore[attr-defined]
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="no result"):
        stream.result()


def test_a_stream_reconnects(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(drop_at_step=2, step_seconds=0.01))

    with caller.stream("a star", seed=7, steps=4, image_count=3) as stream:
        events = list(stream)

    assert len(fake.jobs) == 1
    assert fake.jobs[0].steps_done == 12
    assert sum(isinstance(event, Accepted | Started) for event in events) == 2
    assert [e.image_index for e in events if isinstance(e, ImageReady)] == [0, 1, 2]


def test_a_stream_reconnects_after_real_disconnects(caller: Any, fake: FakeServer) -> None:
    released = threading.Event()
    fake.script(Behaviour(hold=released))

    with caller.stream("a star", seed=7) as stream:
        assert isinstance(next(stream), Accepted)
        fake.drop_connections()
        released.set()
        result = stream.result()

    assert result.images[0].seed == 7
    assert len(fake.jobs) == 1


def test_a_request_is_sent_again_to_a_restarted_server(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(hold=threading.Event()))

    with caller.stream("a star", steps=4) as stream:
        accepted = next(stream)
        fake.restart()
        events = list(stream)

    first, second = fake.jobs
    assert isinstance(accepted, Accepted)
    assert first.request == second.request
    assert (first.state, second.state) == (JobState.CANCELLED, JobState.FINISHED)
    assert events[0] == Reconnecting(attempt=1, reason="UNAVAILABLE")
    assert Restarted(times=1) in events
    again = [kind for kind in kinds(events) if kind != "Reconnecting"]
    assert again == ["Restarted", "Started", "Progress", "ImageReady", "Finished"]
    assert events[-1].result.images[0].seed == accepted.seeds[0]


def test_a_stream_waits_for_a_server_that_loads_after_its_restart(
    caller: Any, fake: FakeServer
) -> None:
    fake.script(Behaviour(hold=threading.Event()))

    with caller.stream("a star") as stream:
        next(stream)
        fake.state = ServerState.LOADING
        fake.restart()
        timer = threading.Timer(0.5, lambda: setattr(fake, "state", ServerState.READY))
        timer.start()
        assert stream.result().images
    timer.join()


def test_a_server_that_loads_longer_than_the_timeout_is_unavailable(
    caller: Any, fake: FakeServer
) -> None:
    loading = Unavailable("the model is loading", reason="MODEL_LOADING", retry_after=60.0)
    fake.script(default=Behaviour(error=loading))

    with caller.stream("a star", timeout=0.5) as stream, pytest.raises(Unavailable) as caught:
        list(stream)

    assert (caught.value.reason, caught.value.retry_after) == ("MODEL_LOADING", 60.0)
    # The hint of 60 s did not end it: there was a further try before the timeout.
    assert fake._registry.rejections.total() > 1
    assert list(stream) == []


def test_progress_starts_again_after_an_engine_crash(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(crash_at_step=2))

    with caller.stream("a star", steps=4) as stream:
        events = list(stream)

    assert Restarted(times=1) in events
    assert [e.step for e in events if isinstance(e, Progress)] == [1, 2, 1, 2, 3, 4]


def test_without_retries_a_lost_connection_is_an_error(connect: Connect, fake: FakeServer) -> None:
    fake.script(Behaviour(drop_at_step=2, step_seconds=0.2))

    client = connect(fake.target, retry=Retry(attempts=1))
    with client.stream("a star", steps=50) as stream, pytest.raises(Unavailable):
        list(stream)

    # And the request does not ask the server to keep the job.
    fake.wait_for(lambda: fake.jobs[0].state is JobState.CANCELLED)


def test_a_server_that_stays_down_is_unavailable_within_the_timeout(
    connect: Connect,
) -> None:
    with FakeServer() as fake:
        client = connect(fake.target)
        fake.script(Behaviour(hold=threading.Event()))
        stream = client.stream("a star", timeout=1.0)
        stream.__enter__()
        next(stream)
    with pytest.raises((Unavailable, DeadlineExceeded)):
        list(stream)
    stream.close()


def test_the_timeout_cancels_the_job(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(hold=threading.Event()))
    caller.status()

    with caller.stream("a star", timeout=0.7) as stream, pytest.raises(DeadlineExceeded):
        list(stream)

    fake.wait_for(lambda: fake.jobs[0].state in (JobState.EXPIRED, JobState.CANCELLED))


def test_closing_the_client_ends_its_streams(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(hold=threading.Event()))
    stream = caller.stream("a star")
    with stream:
        next(stream)
        caller.close()
        with pytest.raises(Cancelled):
            next(stream)

    fake.wait_for(lambda: fake.jobs[0].state is JobState.CANCELLED)


def test_a_withheld_image_is_flagged(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(withheld=True))

    with caller.stream("a star") as stream:
        *_, ready, finished = stream

    assert ready.image.flagged
    assert ready.image.data == b""
    assert finished.reason is FinishReason.WITHHELD


def test_a_submitted_job_can_be_watched_later(caller: Any, fake: FakeServer) -> None:
    released = threading.Event()
    fake.script(Behaviour(hold=released))
    accepted = caller.submit("a star", seed=7, time_limit=60.0)

    with caller.watch(accepted.request_id) as watch:
        assert next(watch).joined
    # The end of a watch does not cancel the job.
    assert fake.jobs[0].state is JobState.RUNNING
    released.set()
    with caller.watch(accepted.request_id) as watch:
        assert watch.result().images[0].seed == 7
    with caller.watch(accepted.request_id) as watch:
        assert watch.result().images[0].seed == 7
    assert len(fake.jobs) == 1


def test_a_submitted_job_expires_at_its_time_limit(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(hold=threading.Event()))

    caller.submit("a star", time_limit=0.05)

    fake.wait_for(lambda: fake.jobs[0].state is JobState.EXPIRED)
    with pytest.raises(ValueError, match="above 0"):
        caller.submit("a star", time_limit=0)


def test_cancelling_by_id(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(hold=threading.Event()))
    accepted = caller.submit("a star")

    assert caller.cancel(accepted.request_id) is True
    assert caller.cancel(accepted.request_id) is False

    with caller.watch(accepted.request_id) as watch, pytest.raises(Cancelled):
        list(watch)


def test_unknown_ids(caller: Any) -> None:
    with pytest.raises(UnknownRequest):
        caller.cancel("never")
    with caller.watch("never") as watch, pytest.raises(UnknownRequest):
        list(watch)


def test_a_negative_preview_every_is_an_error(caller: Any) -> None:
    with pytest.raises(ValueError, match="preview_every"):
        caller.stream("a star", preview_every=-1)


@pytest.mark.parametrize("leave", ["stream", "client"])
def test_the_cancel_call_sends_the_token_of_the_call(connect: Connect, leave: str) -> None:
    with FakeServer(token="secret") as strict:
        strict.script(Behaviour(hold=threading.Event()))
        client = connect(strict.target, insecure=True)
        with client.stream("a star", metadata={"authorization": "Bearer secret"}) as stream:
            next(stream)
            if leave == "client":
                client.close()

        strict.wait_for(lambda: strict.jobs[0].state is JobState.CANCELLED)


def all_cancelled(server: FakeServer) -> bool:
    return all(job.state is JobState.CANCELLED for job in server.jobs)


def test_the_end_of_a_stream_cancels_at_the_server_that_runs_the_job(connect: Connect) -> None:
    with FakeServer() as one, FakeServer() as two:
        servers = (one, two)
        for server in servers:
            server.script(default=Behaviour(hold=threading.Event()))
        targets = ",".join(server.target for server in servers)
        client = connect(f"ipv4:{targets}")
        for _ in range(4):
            with client.stream("a star") as stream:
                next(stream)
        for server in servers:
            server.wait_for(partial(all_cancelled, server))

        assert sum(len(server.jobs) for server in servers) == 4


def test_a_stream_rejoins_its_job_on_the_server_that_has_it(connect: Connect) -> None:
    with FakeServer() as one, FakeServer() as two:
        servers = (one, two)
        for server in servers:
            server.script(default=Behaviour(drop_at_step=2, step_seconds=0.01))
        targets = ",".join(server.target for server in servers)
        client = connect(f"ipv4:{targets}", retry=Retry(initial_backoff=0.01, max_backoff=0.05))
        for seed in range(4):
            with client.stream("a star", seed=seed) as stream:
                assert stream.result().images[0].seed == seed

        assert sum(len(server.jobs) for server in servers) == 4


def test_no_job_is_lost_while_a_server_drains(connect: Connect) -> None:
    with FakeServer() as leaving, FakeServer() as staying:
        released = threading.Event()
        leaving.script(Behaviour(hold=released))
        client = connect(f"ipv4:{leaving.target},{staying.target}")
        kept = connect(leaving.target).submit("a star", seed=7)
        leaving.state = ServerState.DRAINING

        for seed in range(4):
            assert client.generate("a star", seed=seed).images[0].seed == seed
            with client.stream("a star", seed=seed) as stream:
                assert stream.result().images[0].seed == seed
        with client.watch(kept.request_id) as watch:
            assert next(watch).joined
            released.set()
            assert watch.result().images[0].seed == 7

        assert (len(leaving.jobs), len(staying.jobs)) == (1, 8)


@pytest.mark.parametrize("verb", ["generate('a star')", "stream('a star').__enter__().result()"])
def test_an_interrupt_cancels_the_job(fake: FakeServer, verb: str) -> None:
    fake.script(Behaviour(hold=threading.Event()))
    code = f"from darkroom_client import Client\nwith Client() as c:\n    c.{verb}\n"

    with subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        env={**os.environ, "DARKROOM_TARGET": fake.target},
    ) as program:
        fake.wait_for(lambda: len(fake.jobs) == 1, timeout=60)
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)

    assert b"KeyboardInterrupt" in errors
    fake.wait_for(lambda: fake.jobs[0].state is JobState.CANCELLED)


class SlowStatus(ScriptedServer):
    """Sends ``finished``, and the status of the call half a second later."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled: list[bool] = []

    def GenerateStream(self, request: Any, context: Any) -> Any:
        answer = respond(request.generation, context)
        (image,) = answer.images
        data = image.data
        image.ClearField("data")
        for event in (
            {"accepted": {"request_id": "r", "seeds": [image.seed], "model": "demo"}},
            {"image": {"size": len(data), "data": data, "image": image}},
            {"finished": {"timings": answer.timings, "model": "demo"}},
        ):
            yield generation_pb2.GenerateStreamResponse(
                event=generation_pb2.GenerationEvent(**event)
            )
        cancelled = threading.Event()
        assert context.add_callback(cancelled.set)
        self.cancelled.append(cancelled.wait(0.5))


def test_a_finished_stream_is_not_cancelled(connect: Connect) -> None:
    with SlowStatus() as server:
        client = connect(server.address)
        with client.stream("a star", seed=7) as stream:
            for event in stream:
                if isinstance(event, Finished):
                    break
        assert event.result.images[0].seed == 7
    assert server.cancelled == [False]
