"""Idempotency: a request id names a job, to join it, to watch it later, to cancel it."""

import asyncio
from contextvars import ContextVar

import grpc
import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import Failure, Reason
from darkroom_server.dispatch import JobOutcome
from darkroom_server.rpc import generation as generation_rpc
from darkroom_server.service.call_context import CallContext
from darkroom_server.settings import Results
from tests.server.clock import Clock
from tests.server.streams import assembled, kind, read, rest, submit, until, watch
from tests.server.wire import Wire, refusal, serving


def set_caller(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make ``name`` the caller of all later calls."""
    call = CallContext("call", caller=Caller(name=name))
    current: ContextVar[CallContext] = ContextVar("call", default=call)
    monkeypatch.setattr(generation_rpc, "CURRENT_CALL", current)


async def cancel(wire: Wire, request_id: str) -> bool:
    request = generation_pb2.CancelGenerationRequest(request_id=request_id)
    return bool((await wire.generation.CancelGeneration(request)).cancelled)


async def test_two_calls_of_one_id_share_the_job_and_its_random_seed() -> None:
    async with serving() as wire:
        first = wire.generating(request_id="twin")
        await wire.submitted.get()
        call = wire.stream(request_id="twin")
        (accepted,) = await read(call)
        assert accepted.joined
        wire.engine.advance(4)
        events = await rest(call)
        image = (await first).images[0]
        assert image.seed == accepted.seeds[0]
        chunks = [r.event.image for r in events if kind(r) == "image"]
        assert assembled(chunks) == {0: image.data}
        # The third call gets the kept result.
        again = await wire.generate(request_id="twin")
        assert again.images[0] == image
        assert wire.submitted.empty()
        assert wire.server.dispatcher.counts.accepted == 1


async def test_other_fields_are_a_conflict() -> None:
    async with serving() as wire:
        first = wire.generating(request_id="mine", seed=1)
        await wire.submitted.get()
        for call in (wire.generate(request_id="mine", seed=2), wire.generate(request_id="mine")):
            error = await refusal(call)
            assert error.code is grpc.StatusCode.ALREADY_EXISTS
            assert error.info.reason == "REQUEST_CONFLICT"
        wire.engine.advance(4)
        await first
        error = await refusal(rest(wire.stream("other", request_id="mine")))
        assert error.code is grpc.StatusCode.ALREADY_EXISTS


async def test_on_disconnect_is_not_part_of_the_fingerprint() -> None:
    async with serving() as wire:
        first = wire.generating(request_id="mine", seed=1)
        await wire.submitted.get()
        keep = generation_pb2.ON_DISCONNECT_KEEP
        call = wire.stream(request_id="mine", seed=1, on_disconnect=keep)
        assert (await read(call))[0].joined
        wire.engine.advance(4)
        await first
        await rest(call)


async def test_without_an_id_nothing_is_shared() -> None:
    async with serving(fake={"auto": True}) as wire:
        first, second = [await wire.generate(seed=1) for _ in range(2)]
        assert first.request_id != second.request_id
        assert wire.server.dispatcher.counts.accepted == 2
        # No later call can name them, so their results are not kept.
        assert wire.server.results.kept_bytes == 0


async def test_a_joining_call_fails_if_the_reply_is_too_large_for_it() -> None:
    async with serving() as wire:
        call = wire.stream(request_id="big", image_count=16, width=512, height=512)
        await read(call)
        error = await refusal(
            wire.generate(request_id="big", image_count=16, width=512, height=512)
        )
        assert error.info.reason == "REPLY_TOO_LARGE"
        wire.engine.advance(4)
        assert kind((await rest(call))[-1]) == "finished"


async def test_the_last_call_to_end_cancels_the_job() -> None:
    async with serving() as wire:
        first, second = [wire.stream(request_id="shared", steps=1000) for _ in range(2)]
        await read(first)
        await read(second)
        first.cancel()
        await asyncio.wait([asyncio.ensure_future(first.code())])
        wire.engine.advance()
        await until(second, "progress")
        assert wire.cancelled.empty()
        second.cancel()
        assert await wire.cancelled.get() == "shared"
        wire.engine.advance(0)
        await wire.counted(JobOutcome.CANCELLED)


async def test_a_kept_job_waits_for_its_caller_to_reattach() -> None:
    async with serving() as wire:
        keep = generation_pb2.ON_DISCONNECT_KEEP
        call = wire.stream(request_id="kept", image_count=2, on_disconnect=keep)
        (accepted,) = await read(call)
        job = await wire.submitted.get()
        wire.engine.advance(2)
        wire.engine.deliver(job.id, 0)
        await until(call, "image")
        call.cancel()
        await wire.subscribers("kept", 0)
        assert wire.cancelled.empty()
        again = watch(wire, "kept")
        first, _, chunk = await read(again, 3)
        assert first.joined
        assert list(first.seeds) == list(accepted.seeds)
        # The image that was sent before is sent again.
        assert (chunk.image_index, chunk.image.seed) == (0, accepted.seeds[0])
        wire.engine.advance(2)
        events = await rest(again)
        assert kind(events[-1]) == "finished"
        assert {r.event.image.image_index for r in events if kind(r) == "image"} >= {1}


async def test_a_kept_job_is_cancelled_after_the_reattach_grace() -> None:
    async with serving(results=Results(reattach_grace=0.05)) as wire:
        keep = generation_pb2.ON_DISCONNECT_KEEP
        call = wire.stream(request_id="kept", on_disconnect=keep)
        await read(call)
        call.cancel()
        assert await wire.cancelled.get() == "kept"
        error = await refusal(rest(watch(wire, "kept")))
        assert error.code is grpc.StatusCode.CANCELLED
        assert error.info.reason == "CANCELLED"


async def test_a_submitted_job_runs_without_a_subscription() -> None:
    async with serving() as wire:
        accepted = await submit(wire, request_id="later", seed=3)
        assert (accepted.request_id, list(accepted.seeds), accepted.joined) == ("later", [3], False)
        await wire.submitted.get()
        call = watch(wire, "later")
        await read(call)
        call.cancel()
        await wire.subscribers("later", 0)
        wire.engine.advance(4)
        await wire.counted(JobOutcome.FINISHED)
        events = await rest(watch(wire, "later"))
        assert [kind(r) for r in events] == ["accepted", "started", "image", "finished"]
        # Generate gets the result too.
        assert (await wire.generate(request_id="later", seed=3)).images[0].seed == 3
        assert (await submit(wire, request_id="later", seed=3)).joined


async def test_a_submitted_job_without_an_id_gets_one() -> None:
    async with serving(fake={"auto": True}) as wire:
        accepted = await submit(wire)
        events = await rest(watch(wire, accepted.request_id))
        assert kind(events[-1]) == "finished"


async def test_a_time_limit_is_the_jobs_deadline(clock: Clock) -> None:
    async with serving() as wire:
        await submit(wire, request_id="short", time_limit=600.0)
        clock.skip(600.0)
        assert await wire.cancelled.get() == "short"
        error = await refusal(rest(watch(wire, "short")))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        bad = await refusal(submit(wire, time_limit=-1.0))
        assert set(bad.violations) == {"time_limit"}


async def test_the_submitting_calls_own_deadline_is_not_the_jobs() -> None:
    async with serving() as wire:
        request = generation_pb2.SubmitGenerationRequest(
            generation=generation_pb2.GenerateRequest(prompt="a star")
        )
        await wire.generation.SubmitGeneration(request, timeout=60)
        assert (await wire.submitted.get()).deadline is None
        wire.engine.advance(4)


async def test_a_watcher_gets_the_failure_of_the_job() -> None:
    async with serving() as wire:
        await submit(wire, request_id="bad")
        await wire.submitted.get()
        wire.engine.fail("bad", Failure(Reason.NON_FINITE, "not a number"))
        error = await refusal(rest(watch(wire, "bad")))
        assert (error.code, error.info.reason) == (grpc.StatusCode.INTERNAL, "NON_FINITE")
        # The same request starts a new run.
        call = wire.generating(request_id="bad")
        await wire.submitted.get()
        wire.engine.advance(4)
        assert (await call).images


async def test_cancelling_by_id_ends_every_call_of_the_job() -> None:
    async with serving() as wire:
        call = wire.generating(request_id="gone")
        await wire.submitted.get()
        watcher = watch(wire, "gone")
        await read(watcher)
        assert await cancel(wire, "gone")
        for waiting in (call, rest(watcher)):
            error = await refusal(waiting)
            assert error.code is grpc.StatusCode.CANCELLED
            assert error.info.reason == "CANCELLED"
        assert await wire.cancelled.get() == "gone"
        assert not await cancel(wire, "gone")


@pytest.mark.parametrize("id", ["never", "x" * 65, ""])
async def test_an_unknown_id_is_not_found(id: str) -> None:
    async with serving() as wire:
        for call in (rest(watch(wire, id)), cancel(wire, id)):
            error = await refusal(call)
            if id == "never":
                assert error.code is grpc.StatusCode.NOT_FOUND
                assert error.info.reason == "UNKNOWN_REQUEST"
            else:
                assert set(error.violations) == {"request_id"}


async def test_another_callers_id_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as wire:
        set_caller(monkeypatch, "ada")
        await submit(wire, request_id="mine")
        await wire.submitted.get()
        set_caller(monkeypatch, "bob")
        for call in (rest(watch(wire, "mine")), cancel(wire, "mine")):
            assert (await refusal(call)).code is grpc.StatusCode.NOT_FOUND
        # Bob may use the same id for a job of his own.
        assert not (await submit(wire, "another", request_id="mine")).joined
        jobs = {job.caller: job.prompt for job in wire.engine.jobs}
        assert jobs == {"ada": "a star", "bob": "another"}
        wire.engine.advance(4)


async def test_results_expire_after_their_ttl() -> None:
    async with serving(fake={"auto": True}, results=Results(result_ttl=0.0)) as wire:
        first = await wire.generate(request_id="a")
        second = await wire.generate(request_id="a")
        assert first.images[0].seed != second.images[0].seed
        assert (await refusal(rest(watch(wire, "a")))).code is grpc.StatusCode.NOT_FOUND
