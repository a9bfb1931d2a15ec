"""A suspended run: thread state, ends, and what stays in memory."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
import torch

from darkroom_server.engine.pipelines.coroutine import (
    Coroutine,
    SampleEnded,
    SwallowedEnd,
    ThreadState,
    is_suspendable,
    suspend,
    thread_state,
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As the loop's thread is."""
    with torch.inference_mode():
        yield


def state() -> ThreadState:
    return thread_state("cpu")


def coroutine(run: Callable[[], Any]) -> Coroutine:
    return Coroutine(run, "cpu")


def test_it_goes_on_from_its_suspension() -> None:
    def run() -> int:
        assert is_suspendable()
        first = suspend("a", "cpu")
        return int(first + suspend("b", "cpu"))

    made = coroutine(run)
    assert not is_suspendable()
    assert (made.start(), made.resume(1), made.ended) == ("a", "b", False)
    assert (made.resume(2), made.ended) == (3, True)


def test_what_it_raises_is_raised_outside() -> None:
    def run() -> None:
        suspend(None, "cpu")
        raise ValueError("bad size")

    made = coroutine(run)
    made.start()
    with pytest.raises(ValueError, match="bad size"):
        made.resume(None)
    assert made.ended


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "enable_grad": torch.enable_grad,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_each_run_and_the_loop_keep_their_own_thread_state(name: str) -> None:
    """Two runs whose contexts overlap; the first one leaves its context first."""
    seen: dict[str, list[ThreadState]] = {"plain": [], "inside": []}

    def plain() -> None:
        for _ in range(3):
            seen["plain"].append(state())
            suspend(None, "cpu")

    def inside() -> None:
        with CONTEXTS[name]():
            for _ in range(3):
                seen["inside"].append(state())
                suspend(None, "cpu")

    base = state()
    first, second, other = coroutine(inside), coroutine(inside), coroutine(plain)
    for each in (first, second, other):
        each.start()
        assert state() == base
    for _ in range(2):
        for each in (first, other, second):
            each.resume(None)
            assert state() == base
    for each in (first, other, second):
        each.resume(None)
        assert state() == base
    with CONTEXTS[name]():
        entered = state()
    assert seen["inside"] == [entered] * 6
    assert seen["plain"] == [base] * 3
    changes_something = entered != base
    assert changes_something is (name != "no_grad"), "the loop has no grad anyway"


def test_leaving_inference_mode_across_a_switch_is_an_error() -> None:
    def run() -> None:
        with torch.inference_mode(mode=False):
            suspend(None, "cpu")

    made = coroutine(run)
    with pytest.raises(RuntimeError, match="inference mode"):
        made.start()


def test_bound_log_values_are_there_in_a_run() -> None:
    with structlog.contextvars.bound_contextvars(job="a"):
        made = coroutine(structlog.contextvars.get_contextvars)
        assert made.start() == {"job": "a"}


def test_an_end_is_raised_at_the_pending_call() -> None:
    ends: list[str] = []

    def run() -> None:
        try:
            suspend(None, "cpu")
        except SampleEnded:
            ends.append("raised")
            raise

    made = coroutine(run)
    made.start()
    before = state()
    made.end()
    made.end()
    assert (ends, made.ended, state()) == (["raised"], True, before)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_that_swallows_its_end_is_reported(goes_on: bool) -> None:
    def run() -> None:
        try:
            suspend(None, "cpu")
        except BaseException:
            if goes_on:
                suspend(None, "cpu")

    made = coroutine(run)
    made.start()
    with pytest.raises(SwallowedEnd):
        made.end()


def held_by_run(make: Callable[[], Coroutine], end: Callable[[Coroutine], None]) -> int:
    """How many of 200 runs' tensors are alive after ``end``, by reference counts alone."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def run() -> None:
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        suspend(tensor, "cpu")

    gc.collect()
    gc.disable()
    try:
        for _ in range(200):
            made = Coroutine(run, "cpu")
            made.start()
            end(made)
            del made
        return sum(ref() is not None for ref in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("end", [Coroutine.end, lambda made: None], ids=["ended", "dropped"])
def test_no_tensor_of_a_run_stays_alive(end: Callable[[Coroutine], None]) -> None:
    assert held_by_run(lambda: coroutine(lambda: None), end) == 0


def test_a_run_that_holds_its_greenlet_would_stay_alive() -> None:
    """The control: what the test above would find in a careless ``suspend``."""
    import greenlet

    alive: list[weakref.ref[torch.Tensor]] = []

    def careless() -> None:
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        own = greenlet.getcurrent()
        assert own.parent is not None
        own.parent.switch()

    made = coroutine(careless)
    made.start()
    del made
    gc.collect()
    assert alive[0]() is not None


def test_held_bytes_count_each_tensor_of_the_run_once() -> None:
    def run() -> None:
        tensor = torch.zeros(1000)
        same = {"again": [tensor[:10]], "other": torch.zeros(10)}
        suspend(same, "cpu")

    made = coroutine(run)
    made.start()
    assert made.held_bytes() == 4 * 1010
    made.end()


def test_a_run_stays_on_its_thread() -> None:
    made = coroutine(lambda: suspend(None, "cpu"))
    made.start()
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            made.resume(None)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "different thread" in str(errors[0])
    made.end()
