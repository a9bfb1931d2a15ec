"""Many calls: bounded, in order, and each with its own error."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from darkroom_client import (
    GenerationFailed,
    GenerationRequest,
    GenerationResult,
    InvalidRequest,
)
from darkroom_client.testing import Behaviour, FakeServer, JobState
from tests.client.scripted import ScriptedServer, fail, respond


def test_answers_and_errors_come_in_order(client: Any, server: ScriptedServer) -> None:
    def by_prompt(request: Any, context: grpc.ServicerContext) -> Any:
        behave = (
            fail(grpc.StatusCode.INTERNAL, "NON_FINITE") if request.prompt == "bad" else respond
        )
        return behave(request, context)

    server.script.extend([by_prompt] * 4)
    requests = [
        "one",
        "bad",
        GenerationRequest(prompt="two", scheduler="no such"),
        GenerationRequest(prompt="three", seed=7, request_id="r-3"),
    ]

    answers = client.generate_many(requests, concurrency=2)

    assert [type(answer) for answer in answers] == [
        GenerationResult,
        GenerationFailed,
        InvalidRequest,
        GenerationResult,
    ]
    assert answers[3].images[0].seed == 7
    assert answers[3].request_id == "r-3"


def test_answers_come_as_completed(client: Any, server: ScriptedServer) -> None:
    released = threading.Event()

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        assert request.prompt != "slow" or released.wait(60)
        return respond(request, context)

    server.script.extend([slow] * 3)
    arrived = []
    for index, answer in client.generate_as_completed(["slow", "quick", "quick"], concurrency=2):
        arrived.append(index)
        assert isinstance(answer, GenerationResult)
        if len(arrived) == 2:
            released.set()

    assert arrived == [1, 2, 0]


def test_never_more_than_concurrency_at_a_time(client: Any, server: ScriptedServer) -> None:
    lock = threading.Lock()
    full = threading.Barrier(3, timeout=30)
    running = peak = 0

    def count(request: Any, context: grpc.ServicerContext) -> Any:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        full.wait()
        with lock:
            running -= 1
        return respond(request, context)

    server.script.extend([count] * 9)

    answers = client.generate_many((f"star {i}" for i in range(9)), concurrency=3)

    assert peak == 3
    assert [answer.images[0].replay.request.prompt for answer in answers] == [
        f"star {i}" for i in range(9)
    ]


def test_no_requests_give_no_answers(client: Any) -> None:
    assert client.generate_many([]) == []


def test_concurrency_must_be_at_least_one(client: Any) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        client.generate_many(["a star"], concurrency=0)


def test_the_end_of_the_loop_cancels_running_calls(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(hold=threading.Event()), Behaviour())
    answers = caller.generate_as_completed(["one", "two"], concurrency=2)

    _, answer = next(answers)
    answers.close()

    assert answer.images
    fake.wait_for(lambda: any(job.state is JobState.CANCELLED for job in fake.jobs))


def test_an_error_of_the_iterable_ends_the_batch(caller: Any, fake: FakeServer) -> None:
    fake.script(Behaviour(hold=threading.Event()))

    def prompts() -> Iterator[str]:
        yield "one"
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        caller.generate_many(prompts(), concurrency=2)

    assert all(job.state is not JobState.FINISHED for job in fake.jobs)


def test_all_requests_share_the_options(client: Any, server: ScriptedServer) -> None:
    requests = ["one", GenerationRequest("two", steps=9, seed=2)]

    client.generate_many(requests, concurrency=1, steps=20, format="raw_rgb")
    list(client.generate_as_completed(requests, concurrency=1, steps=21))

    sent = [(each.prompt, each.steps, each.seed == 2) for each in server.requests]
    assert sent == [("one", 20, False), ("two", 20, True), ("one", 21, False), ("two", 21, True)]
    assert [each.format for each in server.requests] == [4, 4, 0, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request_id": "r-1"}, "names one job"),
        ({"num_inference_steps": 20}, "num_inference_steps is not an option.*use steps"),
    ],
)
def test_options_that_requests_cannot_share(
    client: Any, server: ScriptedServer, options: dict[str, Any], words: str
) -> None:
    for verb in (client.generate_many, client.generate_as_completed):
        with pytest.raises(TypeError, match=words):
            verb([], **options)
