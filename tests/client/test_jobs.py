"""``job``, ``jobs`` and ``result``: jobs of earlier calls, through both clients and the wire."""

import threading
from typing import Any

import pytest

from darkroom_client import (
    Cancelled,
    Client,
    DeadlineExceeded,
    GenerationFailed,
    JobState,
    UnknownRequest,
)
from darkroom_client.testing import Behaviour, FakeServer


def test_a_job_is_seen_from_the_queue_to_its_end(caller: Any, fake: FakeServer) -> None:
    hold = threading.Event()
    fake.script(Behaviour(queue=2, hold=hold))
    request_id = caller.submit("a star", steps=4, image_count=2).request_id
    fake.wait_for(lambda: fake.jobs[0].generation().queue_position == 1)

    waiting = caller.job(request_id)
    hold.set()
    result = caller.result(request_id)
    finished = caller.job(request_id)

    assert (waiting.state, waiting.ended, waiting.step) == (JobState.QUEUED, False, 0)
    assert (waiting.steps, waiting.image_count, waiting.finished_images) == (8, 2, 0)
    assert waiting.request_id == request_id
    assert [image.seed for image in result.images] == [fake.jobs[0].images[i].seed for i in (0, 1)]
    assert (finished.state, finished.ended) == (JobState.FINISHED, True)
    assert (finished.step, finished.finished_images, finished.queue_position) == (8, 2, None)
    assert finished.age > waiting.age


def test_asking_for_a_job_does_not_watch_it(caller: Any, fake: FakeServer) -> None:
    hold = threading.Event()
    fake.script(Behaviour(hold=hold))
    request_id = caller.submit("a star").request_id

    assert caller.job(request_id).state is JobState.RUNNING
    assert fake.jobs[0].waiters == 0

    hold.set()
    assert caller.result(request_id).images


def test_a_failed_job_says_why(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(error=GenerationFailed("not a number"), error_at_step=2))
    request_id = caller.submit("a star").request_id

    with pytest.raises(GenerationFailed, match="not a number"):
        caller.result(request_id)

    job = caller.job(request_id)
    assert (job.state, job.error_message) == (JobState.FAILED, "not a number")
    assert job.error_reason == "ENGINE_FAILED"


def test_a_result_that_comes_too_late_leaves_the_job_running(caller: Any, fake: FakeServer) -> None:
    hold = threading.Event()
    fake.script(Behaviour(hold=hold))
    request_id = caller.submit("a star").request_id

    with pytest.raises(DeadlineExceeded):
        caller.result(request_id, 0.2)

    assert caller.job(request_id).state is JobState.RUNNING
    assert caller.cancel(request_id)
    with pytest.raises(Cancelled):
        caller.result(request_id)
    assert caller.job(request_id).state is JobState.CANCELLED


def test_an_unknown_job(caller: Any) -> None:
    for verb in (caller.job, caller.result):
        with pytest.raises(UnknownRequest) as caught:
            verb("nobody")
        assert caught.value.request_id == "nobody"


def test_every_page_of_jobs_is_read(caller: Any, fake: FakeServer) -> None:
    assert list(caller.jobs()) == []
    with Client(fake.target) as submitter:
        ids = [submitter.submit("a star", steps=1).request_id for _ in range(201)]

    assert [job.request_id for job in caller.jobs()] == ids[::-1]


def test_a_stream_has_its_result_without_a_block(caller: Any, fake: FakeServer) -> None:
    stream = caller.stream("a star", seed=7)

    result = stream.result()

    assert result.images[0].seed == 7
    assert stream.result() is result
    fake.wait_for(lambda: fake.jobs[0].waiters == 0)


def test_a_stream_without_a_block_raises_the_error_of_its_job(
    caller: Any, fake: FakeServer
) -> None:
    fake.script(Behaviour(error=GenerationFailed("not a number"), error_at_step=2))

    with pytest.raises(GenerationFailed, match="not a number"):
        caller.stream("a star").result()
