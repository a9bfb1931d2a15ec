"""Many calls with bounded concurrency; each answer comes with the index of its request."""

import asyncio
import heapq
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from darkroom_client._checks import check_integer
from darkroom_client._errors import DarkroomError
from darkroom_client._protocol.pacing import BatchPacer
from darkroom_client._protocol.retries import Call
from darkroom_client._transport.sync import InFlightCall, SyncTransport
from darkroom_client._types.request import GenerationOptions, GenerationRequest, as_request
from darkroom_client._types.result import GenerationResult

Answer = GenerationResult | DarkroomError
"""The answer to one of many requests."""

PreparedCall = Call[GenerationResult] | DarkroomError
"""The call of one request, or why it cannot be sent."""

A = TypeVar("A")
Item = TypeVar("Item")


def prepare(
    calls: Callable[[GenerationRequest], Call[GenerationResult]],
    requests: Iterable[GenerationRequest],
) -> Iterator[PreparedCall]:
    """The call of each request; every try of it has the same id and seed."""
    for request in requests:
        try:
            yield calls(request)
        except DarkroomError as error:
            yield error


class Waiting(Generic[Item]):
    """The items that have not been sent, or must be sent again, with their indexes."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._fresh = enumerate(items)
        self._again: deque[tuple[int, Item]] = deque()
        self._read = False

    @property
    def exhausted(self) -> bool:
        """Whether no item remains; false until that is known."""
        return self._read and not self._again

    def next(self) -> tuple[int, Item] | None:
        """The next item, the rejected ones first; None if none remains."""
        if self._again:
            return self._again.popleft()
        item = next(self._fresh, None)
        self._read = item is None
        return item

    def again(self, index: int, item: Item) -> None:
        """Send ``item`` again later."""
        self._again.append((index, item))


def generate_many(
    transport: SyncTransport, calls: Iterable[PreparedCall], pacer: BatchPacer
) -> Iterator[tuple[int, Answer]]:
    """Start every call when ``pacer`` allows it; yield answers as they come.

    It starts no threads: an interrupt reaches the waiting thread at once and cancels what runs.
    """
    running: dict[int, InFlightCall[GenerationResult]] = {}
    sent: dict[int, Call[GenerationResult]] = {}
    # When the next try of a running call begins.
    pauses: list[tuple[float, int]] = []
    # None: the client was closed.
    ended: SimpleQueue[int | None] = SimpleQueue()
    waiting: Waiting[PreparedCall] = Waiting(calls)
    try:
        with transport.waking(ended):
            while True:
                while pacer.wait() == 0 and (item := waiting.next()) is not None:
                    index, call = item
                    if isinstance(call, DarkroomError):
                        yield index, call
                        continue
                    sent[index] = call
                    running[index] = transport.start(call)
                    pacer.started()
                    running[index].when_try_ended(partial(ended.put, index))
                if not running and waiting.exhausted:
                    return
                if not running:
                    transport.check_open()
                waits = [] if waiting.exhausted else [pacer.wait()]
                waits += [max(0.0, due - time.monotonic()) for due, _ in pauses[:1]]
                ending = _next(
                    ended, min((wait for wait in waits if wait is not None), default=None)
                )
                if ending is not None:
                    pause, answer = _end_of_try(running[ending])
                    if answer is None:
                        heapq.heappush(pauses, (time.monotonic() + pause, ending))
                        continue
                    del running[ending]
                    call = sent.pop(ending)
                    if pacer.ended(answer if isinstance(answer, DarkroomError) else None):
                        waiting.again(ending, call)
                    else:
                        yield ending, answer
                while pauses and (transport.closed or pauses[0][0] <= time.monotonic()):
                    _, index = heapq.heappop(pauses)
                    running[index].retry()
                    running[index].when_try_ended(partial(ended.put, index))
    finally:
        for pending in running.values():
            pending.cancel()


def _next(ended: "SimpleQueue[int | None]", wait: float | None) -> int | None:
    """The index of the next try that ends; None after ``wait`` seconds, or if woken."""
    try:
        return ended.get(timeout=wait)
    except Empty:
        return None


def _end_of_try(call: InFlightCall[GenerationResult]) -> tuple[float, Answer | None]:
    """The pause before the next try, or the answer of the last one."""
    try:
        pause = call.end_of_try()
        return (0.0, call.answer()) if pause is None else (pause, None)
    except DarkroomError as error:
        return 0.0, error


async def run_paced(
    run: Callable[[Item], Awaitable[A]], items: Iterable[Item], pacer: BatchPacer
) -> AsyncGenerator[tuple[int, A | DarkroomError], None]:
    """Await ``run`` of every item when ``pacer`` allows it; yield answers as they come.

    Cancelling the caller cancels what runs.
    """

    async def outcome(index: int, item: Item) -> tuple[int, Item, A | DarkroomError]:
        try:
            return index, item, await run(item)
        except DarkroomError as error:
            return index, item, error

    running: set[asyncio.Task[tuple[int, Item, A | DarkroomError]]] = set()
    waiting: Waiting[Item] = Waiting(items)
    try:
        while True:
            while pacer.wait() == 0 and (item := waiting.next()) is not None:
                running.add(asyncio.create_task(outcome(*item)))
                pacer.started()
            if not running and waiting.exhausted:
                return
            wait = None if waiting.exhausted else pacer.wait()
            if not running:
                await asyncio.sleep(wait or 0.0)
                continue
            done, running = await asyncio.wait(
                running, timeout=wait, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                index, again, answer = task.result()
                if pacer.ended(answer if isinstance(answer, DarkroomError) else None):
                    waiting.again(index, again)
                else:
                    yield index, answer
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.gather(*running, return_exceptions=True)


def check_concurrency(concurrency: int) -> int:
    """Return ``concurrency``; raises ``ValueError`` if it is below 1."""
    check_integer("concurrency", concurrency)
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}, must be at least 1")
    return concurrency


def with_options(
    requests: Iterable[GenerationRequest | str], options: GenerationOptions
) -> Iterable[GenerationRequest]:
    """Each of ``requests`` with the ``options`` that all share, made when it is read.

    Raises ``TypeError`` for one string, whose letters would be prompts, and for an option that
    requests cannot share.
    """
    if isinstance(requests, str | GenerationRequest):
        raise TypeError(
            f"requests is one {type(requests).__name__}, must be many: put it in a list"
        )
    if "request_id" in options:
        raise TypeError("request_id names one job: pass GenerationRequests with their own ids")
    as_request("", options)  # A wrong name is an error now, not at the first request.
    return (as_request(request, options) for request in requests)


def in_order(answers: Iterable[tuple[int, Answer]]) -> list[Answer]:
    """The answers, sorted by index."""
    return [answer for _, answer in sorted(answers, key=lambda pair: pair[0])]
