"""Many calls: bounded, in order, and one failure costs the others nothing."""

import threading
from typing import Any

import grpc
import pytest

from darkroom_client import (
    DarkroomError,
    GenerationFailed,
    GenerationRequest,
    GenerationResult,
    InvalidRequest,
)
from tests.client.scripted import ScriptedServer, draw, fail


def test_answers_come_in_order_errors_in_their_place(client: Any, server: ScriptedServer) -> None:
    def by_prompt(request: Any, context: grpc.ServicerContext) -> Any:
        behave = fail(grpc.StatusCode.INTERNAL, "NON_FINITE") if request.prompt == "bad" else draw
        return behave(request, context)

    server.script.extend([by_prompt] * 4)
    requests = [
        "one",
        "bad",
        GenerationRequest(prompt="two", scheduler="no such"),
        GenerationRequest(prompt="three", seed=7, request_id="r-3"),
    ]
    done: dict[int, Any] = {}

    answers = client.generate_many(requests, concurrency=2, on_done=done.__setitem__)

    assert [type(answer) for answer in answers] == [
        GenerationResult,
        GenerationFailed,
        InvalidRequest,
        GenerationResult,
    ]
    assert answers[3].images[0].seed == 7
    assert answers[3].request_id == "r-3"
    assert answers == [done[index] for index in range(4)]


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
        return draw(request, context)

    server.script.extend([count] * 9)

    answers = client.generate_many((f"star {i}" for i in range(9)), concurrency=3)

    assert peak == 3
    assert [answer.images[0].replay.request.prompt for answer in answers] == [
        f"star {i}" for i in range(9)
    ]


def test_no_request_is_no_answer(client: Any) -> None:
    assert client.generate_many([]) == []


def test_concurrency_must_let_one_run(client: Any) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        client.generate_many(["a star"], concurrency=0)


def test_an_error_of_the_callers_own_cancels_what_runs(client: Any, server: ScriptedServer) -> None:
    cancelled = threading.Event()

    def wait_for_cancel(request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(cancelled.set)
        assert cancelled.wait(60)
        return draw(request, context)

    server.script.extend([wait_for_cancel, draw])

    def refuse(index: int, answer: GenerationResult | DarkroomError) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        client.generate_many(["one", "two"], concurrency=2, on_done=refuse)

    assert cancelled.wait(60)
