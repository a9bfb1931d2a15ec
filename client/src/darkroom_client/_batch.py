"""Many calls with bounded concurrency; each answer comes with the index of its request."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from functools import partial
from queue import SimpleQueue

from darkroom_client._checks import check_integer
from darkroom_client._errors import DarkroomError
from darkroom_client._transport.sync import InFlightCall
from darkroom_client._types.request import GenerationOptions, GenerationRequest, as_request
from darkroom_client._types.result import GenerationResult

Answer = GenerationResult | DarkroomError
"""The answer to one of many requests."""


def generate_many(
    start: Callable[[GenerationRequest], InFlightCall[GenerationResult]],
    requests: Iterable[GenerationRequest | str],
    concurrency: int,
) -> Iterator[tuple[int, Answer]]:
    """Start every request, at most ``concurrency`` at a time; yield answers as they come.

    It starts no threads: an interrupt reaches the waiting thread at once and cancels what runs.
    """
    running: dict[int, InFlightCall[GenerationResult]] = {}
    done: SimpleQueue[int] = SimpleQueue()
    waiting = enumerate(requests)
    try:
        while True:
            while len(running) < concurrency and (item := next(waiting, None)) is not None:
                index, request = item
                try:
                    running[index] = start(as_request(request))
                except DarkroomError as error:
                    yield index, error
                else:
                    running[index].when_done(partial(done.put, index))
            if not running:
                return
            index = done.get()
            yield index, running.pop(index).outcome()
    finally:
        for pending in running.values():
            pending.cancel()


async def generate_many_async(
    generate: Callable[[GenerationRequest], Awaitable[GenerationResult]],
    requests: Iterable[GenerationRequest | str],
    concurrency: int,
) -> AsyncGenerator[tuple[int, Answer], None]:
    """Like ``generate_many``; cancelling the caller cancels what runs."""

    async def outcome(index: int, request: GenerationRequest | str) -> tuple[int, Answer]:
        try:
            return index, await generate(as_request(request))
        except DarkroomError as error:
            return index, error

    running: set[asyncio.Task[tuple[int, Answer]]] = set()
    waiting = enumerate(requests)
    try:
        while True:
            while len(running) < concurrency and (item := next(waiting, None)) is not None:
                running.add(asyncio.create_task(outcome(*item)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            while done:
                yield done.pop().result()
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
