"""Many calls leak nothing: no thread, no file descriptor, no task, no entry of a call."""

import asyncio
import gc
import os
import threading

import pytest

from darkroom_client import AsyncClient, Client, DarkroomError, GenerationRequest, InvalidRequest
from darkroom_client.testing import Behaviour, FakeServer

SMALL = GenerationRequest(prompt="a star", width=8, height=8, steps=1)
ROUND = ("generate", "stream", "leave", "refused")

COUNTS = [200, pytest.param(10_000, marks=pytest.mark.slow)]


def prepare(fake: FakeServer) -> None:
    error = Behaviour(error=InvalidRequest("no"))
    fake.script(*[Behaviour(), Behaviour(), Behaviour(), error] * 2500)


def held() -> tuple[int, int]:
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def call(client: Client, kind: str) -> None:
    if kind in ("generate", "refused"):
        try:
            client.generate(SMALL)
        except DarkroomError:
            assert kind == "refused"
        return
    with client.stream(SMALL) as stream:
        next(stream)
        if kind == "stream":
            stream.result()


@pytest.mark.parametrize("count", COUNTS)
def test_blocking_calls_leak_nothing(fake: FakeServer, count: int) -> None:
    prepare(fake)
    with Client(fake.target) as client:
        for kind in ROUND * 5:
            call(client, kind)
        fake.wait_for(lambda: all(job.state != "running" for job in fake.jobs))
        before = held()
        for at in range(count):
            call(client, ROUND[at % 4])
        fake.wait_for(lambda: all(job.state != "running" for job in fake.jobs))
        after = held()

        # The fake server's pool may still grow a handler or two: not one for every call.
        assert after[0] <= before[0] + 8
        assert after[1] <= before[1] + 8
        assert not client._transport._in_flight
        assert len(client._transport._cancels) <= 8


@pytest.mark.parametrize("count", COUNTS)
async def test_asyncio_calls_leak_nothing(fake: FakeServer, count: int) -> None:
    prepare(fake)

    async def use(client: AsyncClient, kind: str) -> None:
        if kind in ("generate", "refused"):
            try:
                await client.generate(SMALL)
            except DarkroomError:
                assert kind == "refused"
            return
        async with client.stream(SMALL) as stream:
            await anext(stream)
            if kind == "stream":
                await stream.result()

    async with AsyncClient(fake.target) as client:
        for kind in ROUND * 5:
            await use(client, kind)
        before = (*held(), len(asyncio.all_tasks()))
        for at in range(count):
            await use(client, ROUND[at % 4])
        await asyncio.gather(*client._transport._cancels)
        after = (*held(), len(asyncio.all_tasks()))

        assert after[0] <= before[0] + 8
        assert after[1] <= before[1] + 8
        assert after[2] <= before[2] + 2
        assert not client._transport._in_flight


async def test_a_cancelled_batch_leaks_no_task(fake: FakeServer) -> None:
    fake.script(default=Behaviour(hold=threading.Event()))

    before = asyncio.all_tasks()
    async with AsyncClient(fake.target) as client:
        many = asyncio.ensure_future(client.generate_many(["one", "two", "three"]))
        await asyncio.to_thread(fake.wait_for, lambda: len(fake.jobs) == 3)
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        await asyncio.to_thread(
            fake.wait_for, lambda: all(job.state == "cancelled" for job in fake.jobs)
        )

    assert asyncio.all_tasks() == before
