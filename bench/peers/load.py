"""The load: asks a peer by a schedule, or as so many callers, and times the answers.

It runs in a process of its own (``contender.Remote``), which does nothing else.
"""

import asyncio
import os
import time
from collections.abc import Callable
from functools import partial

from bench.arrivals import Arrivals, Drawn, Outcome
from bench.peers.protocols import ASKERS, Asker, Ended, GrpcAsker, Wire
from bench.workload import Request

PATIENCE_SECONDS = 300.0
"""A request that takes longer has failed, so that a peer that hangs does not hang the bench."""


class Load:
    """A ``Contender`` whose work is done by whom ``open_asker`` connects to.

    ``stream`` asks for progress too.
    """

    def __init__(self, open_asker: Callable[[], Asker], stream: bool = False) -> None:
        self._runner = asyncio.Runner()
        self._asker = self._runner.run(_opened(open_asker))
        self._stream = stream
        self._run = 0

    def draw(self, arrivals: Arrivals) -> list[Drawn]:
        """Ask for all ``arrivals``; returns when the last one has ended."""
        self._run += 1
        return self._runner.run(self._play(arrivals))

    def passes(self) -> list[tuple[int, float]]:
        """None: the peer's trace has them."""
        return []

    def close(self) -> None:
        """Hang up."""
        self._runner.run(self._asker.close())
        self._runner.close()

    async def _play(self, arrivals: Arrivals) -> list[Drawn]:
        drawn: list[Drawn] = []
        changed = asyncio.Event()
        began = time.monotonic()

        async def answer(at: float, request: Request) -> None:
            drawn.append(await self._ask(at, request, began))
            arrivals.answered(time.monotonic() - began)
            changed.set()

        async with asyncio.TaskGroup() as group:
            while len(drawn) < arrivals.count:
                changed.clear()
                for at, request in arrivals.until(time.monotonic() - began):
                    group.create_task(answer(at, request))
                moment = arrivals.next_at()
                wait = None if moment is None else began + moment - time.monotonic()
                try:
                    async with asyncio.timeout(wait):
                        await changed.wait()
                except TimeoutError:
                    continue  # The next one is due.
        return drawn

    async def _ask(self, at: float, request: Request, began: float) -> Drawn:
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
        # A name is for one request of one server only, and several loads may ask the same server.
        name = f"{os.getpid()}-{self._run}"
        try:
            # The loop's clock is the monotonic one.
            async with asyncio.timeout_at(due + seconds):
                if self._stream and isinstance(self._asker, GrpcAsker):
                    late = time.monotonic() - due
                    first = late + await self._asker.first_progress(request, name)
                else:
                    deadline = request.deadline
                    left = None if deadline is None else due + deadline - time.monotonic()
                    await self._asker.ask(request, name, left)
        except TimeoutError:
            outcome = why
        except Ended as ended:
            outcome = ended.outcome
            if outcome is Outcome.FAILED:
                print(f"request {request.index}: {ended}", flush=True)
        return Drawn(
            request.index,
            request.steps,
            at,
            time.monotonic() - due,
            outcome,
            request.deadline,
            first,
        )


def make_load(wire: Wire, port: int, stream: bool = False) -> tuple[Load, None]:
    """For ``contender.Remote``."""
    return Load(partial(ASKERS[wire], port), stream), None


async def _opened(open_asker: Callable[[], Asker]) -> Asker:
    # On the loop: channels and sessions belong to the one that runs when they are made.
    return open_asker()
