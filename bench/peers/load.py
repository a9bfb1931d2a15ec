"""The load generator: sends requests to a peer by their arrivals, and times the answers.

It runs alone in a process of its own (``bench.inprocess.remote.Remote``).
"""

import asyncio
import os
import time
from collections.abc import Callable
from functools import partial

from bench.peers.protocols import CLIENTS, Ended, GrpcPeerClient, PeerClient, Wire
from bench.workload.arrivals import Answer, Arrivals, Outcome
from bench.workload.requests import Request

PATIENCE_SECONDS = 300.0
"""Timeout of a request, so that a peer that hangs does not block the benchmark."""


class Load:
    """An ``ArrivalServer`` that sends the requests through the client of ``connect``.

    ``stream`` requests progress too.
    """

    def __init__(self, connect: Callable[[], PeerClient], stream: bool = False) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(_opened(connect))
        self._stream = stream
        self._run = 0

    def serve(self, arrivals: Arrivals) -> list[Answer]:
        """Send all ``arrivals``; returns when the last one has ended."""
        self._run += 1
        return self._runner.run(self._play(arrivals))

    def batch_times(self) -> list[tuple[int, float]]:
        """Empty: the peer's trace has them."""
        return []

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.close())
        self._runner.close()

    async def _play(self, arrivals: Arrivals) -> list[Answer]:
        answers: list[Answer] = []
        changed = asyncio.Event()
        began = time.monotonic()

        async def send(at: float, request: Request) -> None:
            answers.append(await self._send(at, request, began))
            arrivals.answered(time.monotonic() - began)
            changed.set()

        async with asyncio.TaskGroup() as group:
            while len(answers) < arrivals.count:
                changed.clear()
                for at, request in arrivals.until(time.monotonic() - began):
                    group.create_task(send(at, request))
                moment = arrivals.next_at()
                wait = None if moment is None else began + moment - time.monotonic()
                try:
                    async with asyncio.timeout(wait):
                        await changed.wait()
                except TimeoutError:
                    continue  # The next request is due.
        return answers

    async def _send(self, at: float, request: Request, began: float) -> Answer:
        due = began + at
        ends = {
            Outcome.EXPIRED: request.deadline,
            Outcome.CANCELLED: request.cancel_after,
            Outcome.FAILED: PATIENCE_SECONDS,
        }
        why, seconds = min(
            ((outcome, s) for outcome, s in ends.items() if s is not None), key=lambda end: end[1]
        )
        outcome, first = Outcome.IMAGE, None
        # Request ids must be unique: several load generators may use the same server.
        name = f"{os.getpid()}-{self._run}"
        try:
            # The clock of the event loop is the monotonic clock.
            async with asyncio.timeout_at(due + seconds):
                if self._stream and isinstance(self._client, GrpcPeerClient):
                    delay = time.monotonic() - due
                    first = delay + await self._client.first_progress(request, name)
                else:
                    deadline = request.deadline
                    remaining = None if deadline is None else due + deadline - time.monotonic()
                    await self._client.generate(request, name, remaining)
        except TimeoutError:
            outcome = why
        except Ended as ended:
            outcome = ended.outcome
            if outcome is Outcome.FAILED:
                print(f"request {request.index}: {ended}", flush=True)
        return Answer(
            request.index,
            request.steps,
            at,
            time.monotonic() - due,
            outcome,
            request.deadline,
            first,
            request.images,
        )


def make_load(wire: Wire, port: int, stream: bool = False) -> tuple[Load, None]:
    """For ``Remote``."""
    return Load(partial(CLIENTS[wire], port), stream), None


async def _opened(connect: Callable[[], PeerClient]) -> PeerClient:
    # Channels and sessions belong to the event loop that runs when they are created.
    return connect()
