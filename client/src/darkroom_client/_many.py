"""Many calls with a bound on how many run at a time, and each one's answer in its place."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from queue import SimpleQueue

import grpc

from darkroom.v1 import generation_pb2
from darkroom_client._call import GenerateCall
from darkroom_client._errors import DarkroomError
from darkroom_client._request import GenerationRequest
from darkroom_client._result import GenerationResult
from darkroom_client._wire.results import decode_response

Answer = GenerationResult | DarkroomError
OnDone = Callable[[int, Answer], None] | None
Running = tuple[GenerateCall, "grpc.Future[generation_pb2.GenerateResponse]"]


def draw_many(
    start: Callable[[GenerationRequest], Running],
    requests: Iterable[GenerationRequest | str],
    concurrency: int,
    on_done: OnDone,
) -> list[Answer]:
    """Start every request, never more than ``concurrency`` at a time, and wait for all.

    No threads of ours: an interrupt reaches the waiting thread at once and cancels what runs.
    """
    answers = _Answers(concurrency, on_done)
    running: dict[int, Running] = {}
    done: SimpleQueue[int] = SimpleQueue()
    waiting = enumerate(requests)
    try:
        while True:
            while len(running) < concurrency and (item := next(waiting, None)) is not None:
                index, request = item
                try:
                    running[index] = start(_as_request(request))
                except DarkroomError as error:
                    answers.add(index, error)
                else:
                    running[index][1].add_done_callback(_teller(done, index))
            if not running:
                return answers.in_order()
            index = done.get()
            answers.add(index, _outcome(*running.pop(index)))
    finally:
        for _, future in running.values():
            future.cancel()


async def draw_many_async(
    draw: Callable[[GenerationRequest], Awaitable[GenerationResult]],
    requests: Iterable[GenerationRequest | str],
    concurrency: int,
    on_done: OnDone,
) -> list[Answer]:
    """As ``draw_many``; cancelling the caller cancels what runs."""
    answers = _Answers(concurrency, on_done)
    # The workers share one iterator, so that requests may be a generator and are drawn on demand.
    waiting = enumerate(requests)

    async def work() -> None:
        for index, request in waiting:
            try:
                answers.add(index, await draw(_as_request(request)))
            except DarkroomError as error:
                answers.add(index, error)

    workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return answers.in_order()


class _Answers:
    """What came back so far, by place."""

    def __init__(self, concurrency: int, on_done: OnDone) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, must be at least 1")
        self._by_index: dict[int, Answer] = {}
        self._on_done = on_done

    def add(self, index: int, answer: Answer) -> None:
        self._by_index[index] = answer
        if self._on_done is not None:
            self._on_done(index, answer)

    def in_order(self) -> list[Answer]:
        return [self._by_index[index] for index in sorted(self._by_index)]


def _teller(done: SimpleQueue[int], index: int) -> Callable[[object], None]:
    return lambda _: done.put(index)


def _as_request(request: GenerationRequest | str) -> GenerationRequest:
    return GenerationRequest(prompt=request) if isinstance(request, str) else request


def _outcome(call: GenerateCall, future: "grpc.Future[generation_pb2.GenerateResponse]") -> Answer:
    try:
        return decode_response(future.result())
    except grpc.FutureCancelledError:
        return call.cancelled()
    except grpc.RpcError as error:
        return call.failure(error)
    except DarkroomError as error:
        return error
