"""Half of the callers leave, each in its own way and moment; the engine's trace is the judge."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from darkroom_server.app import Server
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.events import (
    Event,
    JobCancelled,
    JobFailed,
    JobStarted,
    SampleProgress,
)
from darkroom_server.dispatch import JobOutcome
from darkroom_server.settings import Models, Network, Settings
from tests.engine.conftest import config_for
from tests.engine.tiny import write_tiny_model
from tests.faults.tapped import SERVING, Wire
from tests.server.rpc.test_stream import assembled, kind

CALLERS = 20


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


class TracedEngine(ThreadEngine):
    """Keeps what it told, and stands still at chosen steps until it is told to cancel.

    ``leave_at`` has a step for each job that is to leave, 0 being the moment before its first.
    There the trace gets the job's id, ``on_moment`` is called with it, and the engine's thread
    waits: it can go no further while the caller's leave is on its way.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.trace: list[Event | str] = []
        self.leave_at: dict[str, int] = {}
        self.on_moment: Callable[[str], None] = lambda _: None
        self.on_told: Callable[[], None] = lambda: None
        self._cancelled: dict[str, threading.Event] = {}

    def start(self, emit: Callable[[Event], None]) -> None:
        def tap(event: Event) -> None:
            self.trace.append(event)
            emit(event)
            self.on_told()
            match event:
                case JobStarted(job_id):
                    self._stand_still(job_id, 0)
                case SampleProgress(job_id=job_id, step=step):
                    self._stand_still(job_id, step)

        super().start(tap)

    def cancel(self, job_id: str) -> None:
        super().cancel(job_id)
        if job_id in self._cancelled:
            self._cancelled[job_id].set()

    def steps_after_leaving(self) -> dict[str, dict[int, int]]:
        """Of each job whose caller left: the steps that each image took after that."""
        steps: dict[str, dict[int, int]] = {}
        for entry in self.trace:
            if isinstance(entry, str):
                steps[entry] = {}
            elif isinstance(entry, SampleProgress) and entry.job_id in steps:
                of_job = steps[entry.job_id]
                of_job[entry.image_index] = of_job.get(entry.image_index, 0) + 1
        return steps

    def _stand_still(self, job_id: str, step: int) -> None:
        if step < self.leave_at.get(job_id, step + 1):
            return
        del self.leave_at[job_id]
        self.trace.append(job_id)
        cancelled = self._cancelled[job_id] = threading.Event()
        self.on_moment(job_id)
        if not cancelled.wait(60):
            raise TimeoutError(f"{job_id} was not cancelled")


@asynccontextmanager
async def traced(folder: Path) -> AsyncIterator[tuple[Wire, TracedEngine]]:
    settings = Settings(
        models=Models(model=(f"tiny={folder}",)), network=Network(port=0, metrics_port=0)
    )
    engine = TracedEngine(config_for(folder, rows=4))
    server = Server(settings, [engine])
    await server.startup()
    serve = asyncio.create_task(server.serve())
    async with grpc.aio.insecure_channel(server.address) as channel:
        wire: Any = Wire(server, serve, engine, channel)  # type: ignore[arg-type]
        try:
            await wire.health_becomes(SERVING)
            yield wire, engine
        finally:
            server.stop()
            await serve
            await server.shutdown()


async def drawn(call: Any) -> dict[int, bytes]:
    chunks = []
    while (response := await call.read()) is not grpc.aio.EOF:
        if kind(response) == "image":
            chunks.append(response.event.image)
    return assembled(chunks)


class Leaver:
    """A caller that leaves by cancelling its call, or by the id of its request."""

    def __init__(self, wire: Wire, plan: dict[str, Any], how: str) -> None:
        self._wire = wire
        self._id = plan["request_id"]
        self._how = how
        self._call = wire.stream(**plan)
        self.moment = asyncio.Event()

    async def leave(self) -> None:
        async with asyncio.timeout(120):
            await self.moment.wait()
            if self._how == "cancel":
                self._call.cancel()
            else:
                assert await self._wire.cancel(self._id)
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await drawn(self._call)


def told(engine: TracedEngine) -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Waits until a condition, looked at after each event that the server was told of, holds."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    engine.on_told = lambda: loop.call_soon_threadsafe(changed.set)  # type: ignore[assignment]

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                changed.clear()
                await changed.wait()

    return until


async def test_half_of_the_callers_leave_at_random(tiny_folder: Path) -> None:
    chance = random.Random(1)
    async with traced(tiny_folder) as (wire, engine):
        plans: list[dict[str, Any]] = [
            {
                "request_id": f"caller-{i}",
                "seed": i,
                "steps": chance.randint(8, 40),
                "image_count": chance.randint(1, 2),
                # Who leaves may have shared passes with others, who stays may not.
                "exact": i % 2 == 0 or chance.random() < 0.5,
            }
            for i in range(CALLERS)
        ]
        stay, leave = plans[::2], plans[1::2]
        alone = [await drawn(wire.stream(**{**plan, "request_id": ""})) for plan in stay]
        counts = wire.server.dispatcher.counts
        ended = counts.by_end.copy()
        until = told(engine)

        engine.leave_at = {p["request_id"]: chance.randrange(p["steps"]) for p in leave}
        loop = asyncio.get_running_loop()
        leavers: dict[str, Leaver] = {}
        engine.on_moment = lambda id: loop.call_soon_threadsafe(leavers[id].moment.set)  # type: ignore[assignment]
        staying = []
        for plan in plans:
            if plan in leave:
                how = chance.choice(["cancel", "by id"])
                leavers[plan["request_id"]] = Leaver(wire, plan, how)
            else:
                staying.append(drawn(wire.stream(**plan)))
        leaving = asyncio.gather(*(leaver.leave() for leaver in leavers.values()))
        images, _ = await asyncio.gather(asyncio.gather(*staying), leaving)
        await until(lambda: not counts.live and not wire.server.dispatcher.running_jobs)

        # Those who stayed got the bytes that they would have got alone.
        assert list(images) == alone
        after = engine.steps_after_leaving()
        assert set(after) == set(leavers)
        assert all(count <= 1 for steps in after.values() for count in steps.values()), after
        ends = [event for event in engine.trace if isinstance(event, JobCancelled)]
        assert {end.job_id for end in ends} == set(leavers)
        assert not [event for event in engine.trace if isinstance(event, JobFailed)]
        assert counts.by_end[JobOutcome.FINISHED] - ended[JobOutcome.FINISHED] == len(stay)
        assert counts.by_end[JobOutcome.CANCELLED] - ended[JobOutcome.CANCELLED] == len(leave)
