"""Half of the callers cancel at random steps; the engine's trace shows what it ran afterwards."""

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
from tests.server.streams import assembled, kind

CALLERS = 20


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


class TracedEngine(ThreadEngine):
    """Records the events that it emits, and waits at chosen steps until a job is cancelled.

    ``cancel_at`` has the step at which each of some jobs is cancelled; 0 is before its first step.
    At that step the job's id is added to the trace, ``on_cancel_step`` is called with it, and the
    engine's thread waits for the cancellation, so the job cannot run further in the meantime.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.trace: list[Event | str] = []
        self.cancel_at: dict[str, int] = {}
        self.on_cancel_step: Callable[[str], None] = lambda _: None
        self.on_emitted: Callable[[], None] = lambda: None
        self._cancelled: dict[str, threading.Event] = {}

    def start(self, emit: Callable[[Event], None]) -> None:
        def tap(event: Event) -> None:
            self.trace.append(event)
            emit(event)
            self.on_emitted()
            match event:
                case JobStarted(job_id):
                    self._wait_for_cancel(job_id, 0)
                case SampleProgress(job_id=job_id, step=step):
                    self._wait_for_cancel(job_id, step)

        super().start(tap)

    def cancel(self, job_id: str) -> None:
        super().cancel(job_id)
        if job_id in self._cancelled:
            self._cancelled[job_id].set()

    def steps_after_cancel(self) -> dict[str, dict[int, int]]:
        """For each cancelled job: the steps that each image took after the cancellation."""
        steps: dict[str, dict[int, int]] = {}
        for entry in self.trace:
            if isinstance(entry, str):
                steps[entry] = {}
            elif isinstance(entry, SampleProgress) and entry.job_id in steps:
                of_job = steps[entry.job_id]
                of_job[entry.image_index] = of_job.get(entry.image_index, 0) + 1
        return steps

    def _wait_for_cancel(self, job_id: str, step: int) -> None:
        if step < self.cancel_at.get(job_id, step + 1):
            return
        del self.cancel_at[job_id]
        self.trace.append(job_id)
        cancelled = self._cancelled[job_id] = threading.Event()
        self.on_cancel_step(job_id)
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


async def images_of(call: Any) -> dict[int, bytes]:
    """The images of a stream, by index."""
    chunks = []
    while (response := await call.read()) is not grpc.aio.EOF:
        if kind(response) == "image":
            chunks.append(response.event.image)
    return assembled(chunks)


class CancellingCaller:
    """A caller that cancels its call, or its job by request id."""

    def __init__(self, wire: Wire, plan: dict[str, Any], how: str) -> None:
        self._wire = wire
        self._id = plan["request_id"]
        self._how = how
        self._call = wire.stream(**plan)
        self.at_step = asyncio.Event()

    async def cancel(self) -> None:
        async with asyncio.timeout(120):
            await self.at_step.wait()
            if self._how == "cancel":
                self._call.cancel()
            else:
                assert await self._wire.cancel(self._id)
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await images_of(self._call)


def event_waiter(engine: TracedEngine) -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """A function that waits until a condition holds; it is checked after each engine event."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    engine.on_emitted = lambda: loop.call_soon_threadsafe(changed.set)  # type: ignore[assignment]

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                changed.clear()
                await changed.wait()

    return until


async def test_half_of_the_callers_cancel_at_random_steps(tiny_folder: Path) -> None:
    random_source = random.Random(1)
    async with traced(tiny_folder) as (wire, engine):
        plans: list[dict[str, Any]] = [
            {
                "request_id": f"caller-{i}",
                "seed": i,
                "steps": random_source.randint(8, 40),
                "image_count": random_source.randint(1, 2),
                # A kept job is exact: its bytes must not depend on other jobs.
                "exact": i % 2 == 0 or random_source.random() < 0.5,
            }
            for i in range(CALLERS)
        ]
        kept_plans, cancelled_plans = plans[::2], plans[1::2]
        alone = [await images_of(wire.stream(**{**plan, "request_id": ""})) for plan in kept_plans]
        counts = wire.server.dispatcher.counts
        ended = counts.by_end.copy()
        until = event_waiter(engine)

        engine.cancel_at = {
            p["request_id"]: random_source.randrange(p["steps"]) for p in cancelled_plans
        }
        loop = asyncio.get_running_loop()
        cancelling: dict[str, CancellingCaller] = {}
        engine.on_cancel_step = lambda id: loop.call_soon_threadsafe(cancelling[id].at_step.set)  # type: ignore[assignment]
        kept_calls = []
        for plan in plans:
            if plan in cancelled_plans:
                how = random_source.choice(["cancel", "by id"])
                cancelling[plan["request_id"]] = CancellingCaller(wire, plan, how)
            else:
                kept_calls.append(images_of(wire.stream(**plan)))
        cancelled_calls = asyncio.gather(*(caller.cancel() for caller in cancelling.values()))
        images, _ = await asyncio.gather(asyncio.gather(*kept_calls), cancelled_calls)
        await until(lambda: not counts.live and not wire.server.dispatcher.running_jobs)

        # The kept jobs have the same bytes as when they ran alone.
        assert list(images) == alone
        after = engine.steps_after_cancel()
        assert set(after) == set(cancelling)
        assert all(count <= 1 for steps in after.values() for count in steps.values()), after
        ends = [event for event in engine.trace if isinstance(event, JobCancelled)]
        assert {end.job_id for end in ends} == set(cancelling)
        assert not [event for event in engine.trace if isinstance(event, JobFailed)]
        assert counts.by_end[JobOutcome.FINISHED] - ended[JobOutcome.FINISHED] == len(kept_plans)
        newly_cancelled = counts.by_end[JobOutcome.CANCELLED] - ended[JobOutcome.CANCELLED]
        assert newly_cancelled == len(cancelled_plans)
