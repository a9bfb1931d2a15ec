"""GetGeneration and ListGenerations: the state of jobs, without a subscription to them."""

from typing import Any

import grpc
import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.core.caller import ANONYMOUS
from darkroom_server.core.errors import Failure, Reason
from darkroom_server.dispatch import JobOutcome
from darkroom_server.settings import Dispatch, Results
from tests.server.rpc.test_idempotency import set_caller
from tests.server.streams import read, submit
from tests.server.wire import Wire, refusal, serving


async def state_of(wire: Wire, request_id: str) -> Any:
    request = generation_pb2.GetGenerationRequest(request_id=request_id)
    return (await wire.generation.GetGeneration(request)).generation


async def page(wire: Wire, size: int = 0, token: str = "") -> Any:
    request = generation_pb2.ListGenerationsRequest(page_size=size, page_token=token)
    return await wire.generation.ListGenerations(request)


def name(state: Any) -> str:
    text: str = generation_pb2.GenerationState.Name(state)
    return text.removeprefix("GENERATION_STATE_")


async def test_a_job_is_reported_from_the_queue_to_its_end() -> None:
    async with serving(dispatch=Dispatch(max_resident_samples=2)) as wire:
        await submit(wire, request_id="first", image_count=2, steps=4)
        await submit(wire, request_id="second", image_count=2, steps=4)
        await submit(wire, request_id="third", steps=4)
        await wire.submitted.get()
        wire.engine.advance(3)
        await wire.becomes(
            lambda: wire.server.results.find(ANONYMOUS.name, "first").steps_done == 6
        )
        # The older one last: its age is then more at any speed.
        third, first = await state_of(wire, "third"), await state_of(wire, "first")
        assert (name(first.state), first.step, first.steps) == ("RUNNING", 6, 8)
        assert (first.model, first.image_count, first.finished_images) == ("demo", 2, 0)
        assert not first.HasField("queue_position")
        assert name(third.state) == "QUEUED"
        assert third.queue_position == wire.server.results.find(ANONYMOUS.name, "third").position
        assert (third.step, third.steps) == (0, 4)
        assert first.age.ToNanoseconds() > third.age.ToNanoseconds() > 0
        wire.engine.advance(1)
        await wire.counted(JobOutcome.FINISHED)
        first = await state_of(wire, "first")
        assert (name(first.state), first.step, first.finished_images) == ("FINISHED", 8, 2)
        assert not first.HasField("estimated_finish")
        assert first.error_reason == ""
        for _ in range(2):  # Shutdown waits for the others.
            await wire.submitted.get()
            wire.engine.advance(4)


async def test_asking_for_the_state_does_not_subscribe() -> None:
    async with serving() as wire:
        call = wire.stream(request_id="mine", steps=1000)
        await read(call)
        await wire.subscribers("mine", 1)
        assert name((await state_of(wire, "mine")).state) == "RUNNING"
        assert wire.server.results.find(ANONYMOUS.name, "mine").subscribers == 1
        call.cancel()
        await wire.counted(JobOutcome.CANCELLED)
        ended = await state_of(wire, "mine")
        assert (name(ended.state), ended.error_reason) == ("CANCELLED", "CANCELLED")


async def test_a_failed_job_has_its_reason() -> None:
    async with serving() as wire:
        await submit(wire, request_id="bad")
        await wire.submitted.get()
        wire.engine.fail("bad", Failure(Reason.NON_FINITE, "not a number; try again"))
        await wire.counted(JobOutcome.FAILED)
        bad = await state_of(wire, "bad")
        assert name(bad.state) == "FAILED"
        assert (bad.error_reason, bad.error_message) == ("NON_FINITE", "not a number; try again")
        await submit(wire, request_id="late", steps=1000, time_limit=0.05)
        await wire.counted(JobOutcome.EXPIRED)
        late = await state_of(wire, "late")
        assert (name(late.state), late.error_reason) == ("EXPIRED", "DEADLINE_EXPIRED")


async def test_pages_have_each_job_once_the_last_accepted_first() -> None:
    async with serving(fake={"auto": True}) as wire:
        ids = [f"job-{index}" for index in range(5)]
        for request_id in ids:
            await submit(wire, request_id=request_id)
        first = await page(wire, 2)
        # A job that is accepted between two pages moves no other job to another page.
        await submit(wire, request_id="new")
        second = await page(wire, 2, first.next_page_token)
        third = await page(wire, 2, second.next_page_token)
        seen = [job.request_id for each in (first, second, third) for job in each.generations]
        assert seen == ids[::-1]
        assert third.next_page_token == ""
        # A page that ends with the last job says so.
        assert (await page(wire, 6)).next_page_token == ""
        assert [job.request_id for job in (await page(wire)).generations] == ["new", *ids[::-1]]


async def test_jobs_belong_to_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(fake={"auto": True}) as wire:
        set_caller(monkeypatch, "ann")
        await submit(wire, request_id="hers")
        assert [job.request_id for job in (await page(wire)).generations] == ["hers"]
        set_caller(monkeypatch, "bob")
        assert not (await page(wire)).generations
        error = await refusal(state_of(wire, "hers"))
        assert error.code is grpc.StatusCode.NOT_FOUND
        assert error.info.reason == "UNKNOWN_REQUEST"


async def test_a_job_that_is_no_longer_kept_is_not_listed() -> None:
    async with serving(fake={"auto": True}, results=Results(result_bytes=1)) as wire:
        await submit(wire, request_id="gone")
        await wire.counted(JobOutcome.FINISHED)
        assert not (await page(wire)).generations
        assert (await refusal(state_of(wire, "gone"))).code is grpc.StatusCode.NOT_FOUND


async def test_wrong_arguments_are_named() -> None:
    async with serving() as wire:
        error = await refusal(page(wire, -1, "what"))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations.keys() == {"page_size", "page_token"}
        assert (await refusal(page(wire, 1001))).violations.keys() == {"page_size"}
        for token in ("1", "0-1", "²"):
            assert (await refusal(page(wire, 1, token))).violations.keys() == {"page_token"}
        assert (await refusal(state_of(wire, ""))).violations.keys() == {"request_id"}
