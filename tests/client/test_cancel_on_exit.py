"""A client of a real server stops waiting: the engine gets the cancel before its next step."""

import asyncio

import pytest

from darkroom_client import AsyncClient, Client, DeadlineExceeded, Progress
from tests.server.wire import Wire, serving

SECONDS = 60.0


async def left(wire: Wire) -> str:
    """The job that the engine is asked to cancel, without a step in between."""
    return await asyncio.wait_for(wire.cancelled.get(), SECONDS)


async def test_the_end_of_a_stream_frees_the_server_within_one_step() -> None:
    async with serving() as wire, AsyncClient(wire.server.address) as client:
        async with client.stream("a star", steps=50) as stream:
            await anext(stream)
            job = await asyncio.wait_for(wire.submitted.get(), SECONDS)
            wire.engine.advance(3)
            async for event in stream:
                if isinstance(event, Progress):
                    break

        assert await left(wire) == job.id


async def test_the_end_of_a_blocking_stream_frees_the_server_within_one_step() -> None:
    def leave(address: str) -> None:
        with Client(address) as client, client.stream("a star", steps=50) as stream:
            next(event for event in stream if isinstance(event, Progress))

    async with serving() as wire:
        leaving = asyncio.create_task(asyncio.to_thread(leave, wire.server.address))
        job = await asyncio.wait_for(wire.submitted.get(), SECONDS)
        wire.engine.advance(3)
        await leaving

        assert await left(wire) == job.id


async def test_a_cancelled_task_frees_the_server_within_one_step() -> None:
    async with serving() as wire, AsyncClient(wire.server.address) as client:
        call = asyncio.create_task(client.generate("a star", steps=50))
        job = await asyncio.wait_for(wire.submitted.get(), SECONDS)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

        assert await left(wire) == job.id


async def test_closing_the_client_frees_the_server_within_one_step() -> None:
    async with serving() as wire:
        async with AsyncClient(wire.server.address) as client:
            call = asyncio.create_task(client.generate("a star", steps=50))
            job = await asyncio.wait_for(wire.submitted.get(), SECONDS)

        assert await left(wire) == job.id
        await asyncio.wait([call])
        assert call.exception()


async def test_an_expired_deadline_frees_the_server() -> None:
    async with serving() as wire, AsyncClient(wire.server.address) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("a star", steps=50, timeout=1.0)
        job = await asyncio.wait_for(wire.submitted.get(), SECONDS)

        assert await left(wire) == job.id
