"""What a request id names, for how long, and for whom."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import (
    Failure,
    GenerationFailed,
    JobCancelled,
    Reason,
    RequestConflict,
    UnknownRequest,
)
from darkroom_server.core.job import ImageFormat
from darkroom_server.dispatch import ActiveJob, Dispatcher, JobOutcome, ResultStore
from darkroom_server.dispatch.results import ENTRY_BYTES
from tests.server.clock import Clock
from tests.server.dispatch.desk import dispatching, settle
from tests.server.jobs import make_job

IMAGE_BYTES = 64 * 64 * 3


class Desk:
    def __init__(self, dispatcher: Dispatcher, engine: FakeEngine, requests: ResultStore) -> None:
        self.dispatcher = dispatcher
        self.engine = engine
        self.requests = requests

    def begin(
        self,
        id: str,
        body: bytes = b"body",
        caller: str = "ada",
        deadline: float | None = None,
        keep: bool = False,
        **job: Any,
    ) -> tuple[ActiveJob, bool]:
        by = Caller(name=caller)
        if joined := self.requests.join(by, id, body, deadline, keep=keep):
            return joined, True
        new = make_job(id, format=ImageFormat.RAW_RGB, deadline=deadline, **job)
        return self.requests.submit(new, by, id, body, keep=keep), False

    async def drawn(self, id: str, **job: Any) -> ActiveJob:
        accepted, _ = self.begin(id, **job)
        self.engine.advance(4)
        await accepted.result()
        return accepted

    def knows(self, id: str, caller: str = "ada") -> bool:
        try:
            self.requests.find(caller, id)
        except UnknownRequest:
            return False
        return True


@asynccontextmanager
async def desk(
    *, result_ttl: float = 60.0, result_bytes: int = 2**20, reattach_grace: float = 60.0
) -> AsyncIterator[Desk]:
    async with dispatching() as (dispatcher, engine):
        requests = ResultStore(
            dispatcher,
            result_ttl=result_ttl,
            result_bytes=result_bytes,
            reattach_grace=reattach_grace,
        )
        yield Desk(dispatcher, engine, requests)
        requests.close()


async def test_the_same_request_joins_the_running_job() -> None:
    async with desk() as it:
        first, joined = it.begin("a")
        assert not joined
        assert it.begin("a") == (first, True)
        assert len(it.engine.jobs) == 1


async def test_the_same_request_gets_the_kept_result() -> None:
    async with desk() as it:
        first = await it.drawn("a")
        again, joined = it.begin("a")
        assert (again, joined) == (first, True)
        assert (await again.result()).images == (await first.result()).images
        assert it.dispatcher.counts.accepted == 1


async def test_another_body_is_a_conflict_while_the_id_is_known() -> None:
    async with desk(result_bytes=ENTRY_BYTES + IMAGE_BYTES + 200) as it:
        it.begin("a", b"body")
        with pytest.raises(RequestConflict, match="'a' names a generation with other fields"):
            it.begin("a", b"other")
        it.engine.advance(4)
        await settle()
        with pytest.raises(RequestConflict):
            it.begin("a", b"other")
        await it.drawn("b")  # There is room for one.
        assert not it.begin("a", b"other")[1]


async def test_ids_are_each_callers_own() -> None:
    async with desk() as it:
        first, _ = it.begin("a")
        second, joined = it.begin("a", caller="bob", body=b"other")
        assert not joined
        assert first is not second
        assert first.job.id != second.job.id
        assert it.requests.find("bob", "a") is second
        with pytest.raises(UnknownRequest, match="'b'"):
            it.requests.find("ada", "b")
        with pytest.raises(UnknownRequest):
            it.requests.cancel("eve", "a")
        assert not first.ended


async def test_a_job_that_ended_unfinished_is_run_anew() -> None:
    async with desk() as it:
        failed, _ = it.begin("a")
        it.engine.fail("a", Failure(Reason.NON_FINITE, "not a number"))
        with pytest.raises(GenerationFailed):
            await failed.result()
        # Who watches learns why; who asks again gets a run of its own.
        assert it.requests.find("ada", "a") is failed
        again, joined = it.begin("a")
        assert not joined
        assert it.requests.find("ada", "a") is again
        it.engine.advance(4)
        assert (await again.result()).images
        assert it.requests.find("ada", "a") is again


async def test_the_oldest_results_go_first() -> None:
    room_for_two = 2 * (ENTRY_BYTES + IMAGE_BYTES + 200)
    async with desk(result_bytes=room_for_two) as it:
        for id in "abc":
            await it.drawn(id)
        assert [it.knows(id) for id in "abc"] == [False, True, True]
        assert IMAGE_BYTES < it.requests.kept_bytes <= room_for_two
        assert not it.begin("a")[1]


async def test_a_caller_with_many_results_pushes_out_its_own_only() -> None:
    async with desk(result_bytes=3 * (ENTRY_BYTES + IMAGE_BYTES + 200)) as it:
        await it.drawn("a", caller="bob")
        for id in "abcd":
            await it.drawn(id)
        assert it.knows("a", caller="bob")
        assert [it.knows(id) for id in "abcd"] == [False, False, True, True]
        await it.drawn("b", caller="bob")
        assert [it.knows(id, caller="bob") for id in "ab"] == [False, True]
        assert [it.knows(id) for id in "cd"] == [True, True]


async def test_what_is_larger_than_all_the_room_is_not_kept() -> None:
    async with desk(result_bytes=0) as it:
        accepted = await it.drawn("a")
        assert not it.knows("a")
        assert it.requests.kept_bytes == 0
        # Those who waited have it all the same.
        assert (await accepted.result()).images


async def test_a_result_too_large_to_keep_costs_no_other_caller_its_own() -> None:
    async with desk(result_bytes=ENTRY_BYTES + IMAGE_BYTES + 200) as it:
        await it.drawn("a", caller="bob")
        await it.drawn("b", image_count=3)
        assert it.knows("a", caller="bob")
        assert not it.knows("b")


async def test_results_are_forgotten_in_time(clock: Clock) -> None:
    async with desk(result_ttl=600.0) as it:
        await it.drawn("a")
        clock.skip(300.0)
        await settle()
        assert it.knows("a")
        clock.skip(300.0)
        await settle()
        assert not it.knows("a")
        assert not it.requests.kept_bytes


async def test_a_running_job_is_known_however_long_it_takes() -> None:
    async with desk(result_ttl=0.0, result_bytes=0) as it:
        accepted, _ = it.begin("a")
        await settle()
        assert it.begin("a") == (accepted, True)


async def test_a_job_may_be_kept_for_one_that_comes_back() -> None:
    async with desk() as it:
        accepted, _ = it.begin("a", keep=True)
        with accepted.subscribe():
            pass
        assert not accepted.ended
        assert it.begin("a") == (accepted, True)
        with accepted.subscribe():
            it.engine.advance(4)
            await accepted.result()


async def test_nobody_came_back_in_time() -> None:
    async with desk(reattach_grace=0.02) as it:
        accepted, _ = it.begin("a", keep=True)
        with accepted.subscribe():
            pass
        with pytest.raises(JobCancelled):
            await accepted.result()
        assert it.dispatcher.counts.by_end == {JobOutcome.CANCELLED: 1}


async def test_a_detached_job_needs_no_waiter() -> None:
    async with desk() as it:
        accepted, _ = it.begin("a")
        it.requests.detach(accepted)
        with accepted.subscribe():
            pass
        assert accepted._grace_timer is None
        it.engine.advance(4)
        assert (await accepted.result()).images


async def test_detaching_saves_a_job_that_nobody_waits_for() -> None:
    async with desk(reattach_grace=0.05) as it:
        accepted, _ = it.begin("a", keep=True)
        other, _ = it.begin("b", keep=True)
        for job in (accepted, other):
            with job.subscribe():
                pass
        it.requests.detach(accepted)
        with pytest.raises(JobCancelled):
            await other.result()
        assert not accepted.ended
        it.engine.advance(4)
        assert (await accepted.result()).images


async def test_cancelling_by_name() -> None:
    async with desk() as it:
        accepted, _ = it.begin("a")
        it.requests.detach(accepted)
        assert it.requests.cancel("ada", "a")
        with pytest.raises(JobCancelled):
            await accepted.result()
        assert not it.requests.cancel("ada", "a")


async def test_a_joining_call_moves_the_deadline_out_and_never_in() -> None:
    async with desk() as it:
        now = time.monotonic()
        accepted, _ = it.begin("a", deadline=now + 60)
        it.begin("a", deadline=now + 30)
        assert accepted.job.deadline == now + 60
        it.begin("a", deadline=now + 90)
        assert accepted.job.deadline == now + 90
        assert it.engine.jobs[0].deadline == now + 90
        it.begin("a", deadline=None)
        assert accepted.job.deadline is None
        it.begin("a", deadline=now + 30)
        assert accepted.job.deadline is None


async def test_the_moved_deadline_is_the_one_that_ends_the_job(clock: Clock) -> None:
    async with desk() as it:
        accepted, _ = it.begin("a", deadline=time.monotonic() + 300)
        other, _ = it.begin("b", deadline=time.monotonic() + 300)
        it.begin("a", deadline=time.monotonic() + 900)
        clock.skip(300)
        with pytest.raises(Exception, match="deadline passed"):
            await other.result()
        assert not accepted.ended
