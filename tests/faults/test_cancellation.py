"""Half of the callers leave, each in its own way and moment; the engine's trace is the judge."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from darkroom_server.app import Server
from darkroom_server.core.events import (
    Event,
    JobCancelled,
    JobFailed,
    JobFinished,
    SampleProgress,
)
from darkroom_server.dispatch import End
from darkroom_server.engine.thread import ThreadEngine
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
    """Keeps what it was told and what it told, in one order."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trace: list[Event | str] = []
        self.on_event: Callable[[Event], None] = lambda _: None
        self._tracing = threading.Lock()

    def start(self, emit: Callable[[Event], None]) -> None:
        def tap(event: Event) -> None:
            with self._tracing:
                self.trace.append(event)
            self.on_event(event)
            emit(event)

        super().start(tap)

    def cancel(self, job_id: str) -> None:
        """The mark comes after the deed: a step that ends later may have begun before it."""
        super().cancel(job_id)
        with self._tracing:
            self.trace.append(job_id)

    def steps_after_cancel(self) -> dict[str, dict[int, int]]:
        """Of each job that was cancelled: the steps that each image took after that."""
        steps: dict[str, dict[int, int]] = {}
        for entry in self.trace:
            if isinstance(entry, str):
                steps.setdefault(entry, {})
            elif isinstance(entry, SampleProgress) and entry.job_id in steps:
                of_job = steps[entry.job_id]
                of_job[entry.image_index] = of_job.get(entry.image_index, 0) + 1
        return steps


@asynccontextmanager
async def traced(folder: Path) -> AsyncIterator[tuple[Wire, TracedEngine]]:
    settings = Settings(
        models=Models(model=(f"tiny={folder}",)), network=Network(port=0, metrics_port=0)
    )
    engine = TracedEngine(config_for(folder, max_rows=4))
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


async def leave_at(wire: Wire, call: Any, step: int, how: str, id: str) -> bool:
    """Leave once an image has taken ``step`` steps; False if the call ended first."""
    while (response := await call.read()) is not grpc.aio.EOF:
        if kind(response) == "progress" and response.event.progress.step >= step:
            if how == "cancel":
                call.cancel()
                return True
            return await wire.cancel(id)
    return False


async def test_half_of_the_callers_leave_at_random(tiny_folder: Path) -> None:
    chance = random.Random(1)
    async with traced(tiny_folder) as (wire, engine):
        plans: list[dict[str, Any]] = [
            {
                "request_id": f"caller-{i}",
                "seed": i,
                "steps": chance.randint(8, 40),
                "image_count": chance.randint(1, 2),
                "exact": True,
            }
            for i in range(CALLERS)
        ]
        stay, leave = plans[::2], plans[1::2]
        alone = [await drawn(wire.stream(**{**p, "request_id": ""})) for p in stay]
        ended = dict(wire.server.dispatcher.counts.by_end)
        calls = [(plan, wire.stream(**plan)) for plan in plans]
        leaving = [
            leave_at(
                wire,
                call,
                chance.randint(1, plan["steps"]),
                chance.choice(["cancel", "by id"]),
                plan["request_id"],
            )
            for plan, call in calls
            if plan in leave
        ]
        staying = [drawn(call) for plan, call in calls if plan in stay]
        left, images = await asyncio.gather(asyncio.gather(*leaving), asyncio.gather(*staying))

        # Those who stayed got the bytes that they would have got alone.
        assert list(images) == alone
        assert any(left)

        ids = {plan["request_id"] for plan, gone in zip(leave, left, strict=True) if gone}
        counts = wire.server.dispatcher.counts
        async with asyncio.timeout(60):
            while counts.live or wire.server.dispatcher.running_jobs:
                await asyncio.sleep(0.005)
        after = engine.steps_after_cancel()
        assert set(after) <= {plan["request_id"] for plan in leave}
        assert all(count <= 1 for steps in after.values() for count in steps.values()), after
        ends = {e.job_id: e for e in engine.trace if isinstance(e, JobCancelled)}
        # Who left so late that the job was done with the engine is no matter.
        done = {e.job_id for e in engine.trace if isinstance(e, JobFinished)}
        assert ids <= set(ends) | done
        assert not [e for e in engine.trace if isinstance(e, JobFailed)]
        assert all(end.wasted_seconds > 0 for end in ends.values())
        assert counts.by_end[End.FINISHED] - ended[End.FINISHED] >= len(stay)
