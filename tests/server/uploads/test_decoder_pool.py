"""Worker processes that die, hang or are killed, and callers that wait for them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from darkroom_server.core.errors import GenerationFailed, InvalidRequest, QueueFull, Reason
from darkroom_server.uploads import decoder_pool
from darkroom_server.uploads.decoder_pool import DecoderPool, Fit
from darkroom_server.uploads.failure import DecodeFailure
from darkroom_server.uploads.fit import Bounds
from tests.server.uploads.pictures import NOT_PICTURES, plain, png

FIT = Fit(kind="cover", bounds=Bounds(least=64, most=512, multiple=8), width=64, height=64)
SLOW = png(8000, 7900, bytes(8001 * 7900))
"""It takes seconds to decode, and a few kilobytes to send."""


@pytest.fixture
def failures() -> list[DecodeFailure]:
    return []


@pytest.fixture
async def decoder(failures: list[DecodeFailure]) -> AsyncIterator[DecoderPool]:
    made = DecoderPool(workers=2, max_pixels=64_000_000, timeout=60.0, on_failure=failures.append)
    yield made
    await made.close()


def decoding(decoder: DecoderPool, data: bytes, owner: str = "a") -> "asyncio.Task[Any]":
    return asyncio.create_task(decoder.decode(owner, "image", data, FIT))


async def busy_worker(decoder: DecoderPool) -> int:
    """The process id of the worker, once it has the picture."""
    async with asyncio.timeout(60):
        while not (pids := decoder.pids) or _state(pids[0]) != "R":
            await asyncio.sleep(0.005)
    return pids[0]


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


async def test_a_worker_serves_many_pictures(decoder: DecoderPool) -> None:
    await decoder.decode("a", "image", plain(), FIT)
    pids = decoder.pids
    for data in (plain(), NOT_PICTURES["svg"], plain()):
        if data == plain():
            await decoder.decode("a", "image", data, FIT)
        else:
            with pytest.raises(InvalidRequest):
                await decoder.decode("a", "image", data, FIT)
    assert decoder.pids == pids


async def test_a_killed_worker_costs_its_own_request_only(
    decoder: DecoderPool, failures: list[DecodeFailure]
) -> None:
    slow = decoding(decoder, SLOW)
    os.kill(await busy_worker(decoder), signal.SIGKILL)
    with pytest.raises(GenerationFailed) as caught:
        await slow
    assert caught.value.reason is Reason.INTERNAL
    assert failures == [DecodeFailure.WORKER_DIED]
    assert (await decoder.decode("a", "image", plain(), FIT)).width == 64


async def test_a_picture_that_crashes_its_worker_is_invalid(
    decoder: DecoderPool, failures: list[DecodeFailure]
) -> None:
    slow = decoding(decoder, SLOW)
    os.kill(await busy_worker(decoder), signal.SIGSEGV)
    with pytest.raises(InvalidRequest, match="image: cannot be decoded"):
        await slow
    assert failures == [DecodeFailure.WORKER_DIED]
    assert (await decoder.decode("a", "image", plain(), FIT)).width == 64


async def test_an_idle_worker_that_was_killed_is_replaced(decoder: DecoderPool) -> None:
    await decoder.decode("a", "image", plain(), FIT)
    (pid,) = decoder.pids
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while any(worker.alive for worker in decoder._idle):
            await asyncio.sleep(0.005)
    assert (await decoder.decode("a", "image", plain(), FIT)).width == 64
    assert decoder.pids != [pid]


async def test_a_picture_that_takes_too_long_is_invalid(failures: list[DecodeFailure]) -> None:
    decoder = DecoderPool(workers=1, max_pixels=64_000_000, timeout=0.5, on_failure=failures.append)
    try:
        with pytest.raises(InvalidRequest, match=r"takes more than 0\.5 s to decode"):
            await decoder.decode("a", "image", SLOW, FIT)
        assert failures == [DecodeFailure.TOO_SLOW]
        assert decoder.pids == []
    finally:
        await decoder.close()


async def test_a_cancelled_call_ends_its_worker(decoder: DecoderPool) -> None:
    slow = decoding(decoder, SLOW)
    pid = await busy_worker(decoder)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert (await decoder.decode("a", "image", plain(), FIT)).width == 64
    assert pid not in decoder.pids


async def test_one_caller_does_not_keep_others_waiting(decoder: DecoderPool) -> None:
    slow = [decoding(decoder, SLOW, "greedy") for _ in range(3)]
    await busy_worker(decoder)
    assert (await decoder.decode("b", "image", plain(), FIT)).width == 64
    assert not any(task.done() for task in slow)
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_files_that_wait_are_bounded(
    decoder: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_pool, "MAX_WAITING_BYTES", 3 * len(SLOW))
    slow = decoding(decoder, SLOW)
    await busy_worker(decoder)
    with pytest.raises(QueueFull):  # More than half of it is for others.
        await decoder.decode("a", "image", SLOW, FIT)
    others = [decoding(decoder, SLOW, owner) for owner in "bc"]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await decoder.decode("d", "image", plain(), FIT)
    for task in (slow, *others):
        task.cancel()
    await asyncio.gather(slow, *others, return_exceptions=True)
    assert (await decoder.decode("d", "image", plain(), FIT)).width == 64


async def test_the_event_loop_goes_on_meanwhile(decoder: DecoderPool) -> None:
    slow, turns = decoding(decoder, SLOW), 0
    while not slow.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert (await slow).width == 64
    assert turns > 20


async def test_workers_get_no_secrets(
    decoder: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    await decoder.decode("a", "image", plain(), FIT)
    with open(f"/proc/{decoder.pids[0]}/environ") as environ:
        assert "secret" not in environ.read()


async def test_close_ends_the_workers(decoder: DecoderPool) -> None:
    await decoder.decode("a", "image", plain(), FIT)
    (pid,) = decoder.pids
    await decoder.close()
    assert not os.path.exists(f"/proc/{pid}")
