"""Which job a request id names, for how long, and for which caller."""

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
from darkroom_server.core.job import PROMPT_FIELDS, ImageFormat
from darkroom_server.dispatch import ActiveJob, Dispatcher, JobOutcome, ResultStore
from darkroom_server.dispatch.results import ENTRY_BYTES
from tests.server.clock import Clock
from tests.server.dispatch.harness import dispatching, settle
from tests.server.jobs import make_job

IMAGE_BYTES = 64 * 64 * 3


class Harness:
    """A result store over a dispatcher with the fake engine."""

    def __init__(self, dispatcher: Dispatcher, engine: FakeEngine, store: ResultStore) -> None:
        self.dispatcher = dispatcher
        self.engine = engine
        self.store = store

    def begin(
        self,
        id: str,
        body: bytes = b"body",
        caller: str = "ada",
        deadline: float | None = None,
        keep: bool = False,
        **job: Any,
    ) -> tuple[ActiveJob, bool]:
        """Join the job of ``id`` or submit one; returns the job, and whether it was joined."""
        by = Caller(name=caller)
        if joined := self.store.join(by, id, body, deadline, keep=keep):
            return joined, True
        new = make_job(id, format=ImageFormat.RAW_RGB, deadline=deadline, **job)
        return self.store.submit(new, by, id, body, keep=keep), False

    async def finished(self, id: str, **job: Any) -> ActiveJob:
        """A job that has run to its end."""
        active, _ = self.begin(id, **job)
        self.engine.advance(4)
        await active.result()
        return active

    def knows(self, id: str, caller: str = "ada") -> bool:
        try:
            self.store.find(caller, id)
        except UnknownRequest:
            return False
        return True


@asynccontextmanager
async def result_store(
    *, result_ttl: float = 60.0, result_bytes: int = 2**20, reattach_grace: float = 60.0
) -> AsyncIterator[Harness]:
    async with dispatching() as (dispatcher, engine):
        store = ResultStore(
            dispatcher,
            result_ttl=result_ttl,
            result_bytes=result_bytes,
            reattach_grace=reattach_grace,
        )
        yield Harness(dispatcher, engine, store)
        store.close()


async def test_the_same_request_joins_the_running_job() -> None:
    async with result_store() as it:
        first, joined = it.begin("a")
        assert not joined
        assert it.begin("a") == (first, True)
        assert len(it.engine.jobs) == 1


async def test_the_same_request_gets_the_kept_result() -> None:
    async with result_store() as it:
        first = await it.finished("a")
        again, joined = it.begin("a")
        assert (again, joined) == (first, True)
        assert (await again.result()).images == (await first.result()).images
        assert it.dispatcher.counts.accepted == 1


async def test_another_body_is_a_conflict_while_the_id_is_known() -> None:
    async with result_store(result_bytes=ENTRY_BYTES + IMAGE_BYTES + 200) as it:
        it.begin("a", b"body")
        with pytest.raises(RequestConflict, match="'a' names a generation with other fields"):
            it.begin("a", b"other")
        it.engine.advance(4)
        await settle()
        with pytest.raises(RequestConflict):
            it.begin("a", b"other")
        await it.finished("b")  # The store has room for one result.
        assert not it.begin("a", b"other")[1]


async def test_request_ids_are_scoped_to_a_caller() -> None:
    async with result_store() as it:
        first, _ = it.begin("a")
        second, joined = it.begin("a", caller="bob", body=b"other")
        assert not joined
        assert first is not second
        assert first.job.id != second.job.id
        assert it.store.find("bob", "a") is second
        with pytest.raises(UnknownRequest, match="'b'"):
            it.store.find("ada", "b")
        with pytest.raises(UnknownRequest):
            it.store.cancel("eve", "a")
        assert not first.ended


async def test_a_failed_job_runs_again_when_it_is_requested_again() -> None:
    async with result_store() as it:
        failed, _ = it.begin("a")
        it.engine.fail("a", Failure(Reason.NON_FINITE, "not a number"))
        with pytest.raises(GenerationFailed):
            await failed.result()
        # A watcher gets the failure; the same request again starts a new run.
        assert it.store.find("ada", "a") is failed
        again, joined = it.begin("a")
        assert not joined
        assert it.store.find("ada", "a") is again
        it.engine.advance(4)
        assert (await again.result()).images
        assert it.store.find("ada", "a") is again


async def test_the_oldest_results_are_evicted_first() -> None:
    room_for_two = 2 * (ENTRY_BYTES + IMAGE_BYTES + 200)
    async with result_store(result_bytes=room_for_two) as it:
        for id in "abc":
            await it.finished(id)
        assert [it.knows(id) for id in "abc"] == [False, True, True]
        assert IMAGE_BYTES < it.store.kept_bytes <= room_for_two
        assert not it.begin("a")[1]


async def test_every_prompt_of_a_result_counts() -> None:
    sizes = []
    for names in ((), *((name,) for name in PROMPT_FIELDS)):
        async with result_store() as it:
            await it.finished("a", **dict.fromkeys(names, "é" * 1000))
            sizes.append(it.store.kept_bytes)
    # Up to four bytes for each character; the prompt replaces that of the other jobs.
    assert sizes[1:] == [sizes[0] + 4 * (1000 - len("a star")), *[sizes[0] + 4000] * 5]


async def test_a_caller_with_many_results_evicts_only_its_own() -> None:
    async with result_store(result_bytes=3 * (ENTRY_BYTES + IMAGE_BYTES + 200)) as it:
        await it.finished("a", caller="bob")
        for id in "abcd":
            await it.finished(id)
        assert it.knows("a", caller="bob")
        assert [it.knows(id) for id in "abcd"] == [False, False, True, True]
        await it.finished("b", caller="bob")
        assert [it.knows(id, caller="bob") for id in "ab"] == [False, True]
        assert [it.knows(id) for id in "cd"] == [True, True]


async def test_a_result_larger_than_the_store_is_not_kept() -> None:
    async with result_store(result_bytes=0) as it:
        active = await it.finished("a")
        assert not it.knows("a")
        assert it.store.kept_bytes == 0
        # A caller that waited for it still gets it.
        assert (await active.result()).images


async def test_a_result_too_large_to_keep_evicts_no_other_callers_result() -> None:
    async with result_store(result_bytes=ENTRY_BYTES + IMAGE_BYTES + 200) as it:
        await it.finished("a", caller="bob")
        await it.finished("b", image_count=3)
        assert it.knows("a", caller="bob")
        assert not it.knows("b")


async def test_results_expire(clock: Clock) -> None:
    async with result_store(result_ttl=600.0) as it:
        await it.finished("a")
        clock.skip(300.0)
        await settle()
        assert it.knows("a")
        clock.skip(300.0)
        await settle()
        assert not it.knows("a")
        assert not it.store.kept_bytes


async def test_a_running_job_is_known_until_it_ends() -> None:
    async with result_store(result_ttl=0.0, result_bytes=0) as it:
        active, _ = it.begin("a")
        await settle()
        assert it.begin("a") == (active, True)


async def test_a_kept_job_waits_for_its_caller_to_reattach() -> None:
    async with result_store() as it:
        active, _ = it.begin("a", keep=True)
        with active.subscribe():
            pass
        assert not active.ended
        assert it.begin("a") == (active, True)
        with active.subscribe():
            it.engine.advance(4)
            await active.result()


async def test_a_kept_job_is_cancelled_after_the_reattach_grace() -> None:
    async with result_store(reattach_grace=0.02) as it:
        active, _ = it.begin("a", keep=True)
        with active.subscribe():
            pass
        with pytest.raises(JobCancelled):
            await active.result()
        assert it.dispatcher.counts.by_end == {JobOutcome.CANCELLED: 1}


async def test_a_detached_job_needs_no_subscription() -> None:
    async with result_store() as it:
        active, _ = it.begin("a")
        it.store.detach(active)
        with active.subscribe():
            pass
        assert active._grace_timer is None
        it.engine.advance(4)
        assert (await active.result()).images


async def test_detaching_ends_the_reattach_grace() -> None:
    async with result_store(reattach_grace=0.05) as it:
        active, _ = it.begin("a", keep=True)
        other, _ = it.begin("b", keep=True)
        for job in (active, other):
            with job.subscribe():
                pass
        it.store.detach(active)
        with pytest.raises(JobCancelled):
            await other.result()
        assert not active.ended
        it.engine.advance(4)
        assert (await active.result()).images


async def test_cancelling_by_request_id() -> None:
    async with result_store() as it:
        active, _ = it.begin("a")
        it.store.detach(active)
        assert it.store.cancel("ada", "a")
        with pytest.raises(JobCancelled):
            await active.result()
        assert not it.store.cancel("ada", "a")


async def test_a_joining_call_extends_the_deadline_and_never_shortens_it() -> None:
    async with result_store() as it:
        now = time.monotonic()
        active, _ = it.begin("a", deadline=now + 60)
        it.begin("a", deadline=now + 30)
        assert active.job.deadline == now + 60
        it.begin("a", deadline=now + 90)
        assert active.job.deadline == now + 90
        assert it.engine.jobs[0].deadline == now + 90
        it.begin("a", deadline=None)
        assert active.job.deadline is None
        it.begin("a", deadline=now + 30)
        assert active.job.deadline is None


async def test_the_extended_deadline_is_the_one_that_expires_the_job(clock: Clock) -> None:
    async with result_store() as it:
        active, _ = it.begin("a", deadline=time.monotonic() + 300)
        other, _ = it.begin("b", deadline=time.monotonic() + 300)
        it.begin("a", deadline=time.monotonic() + 900)
        clock.skip(300)
        with pytest.raises(Exception, match="deadline passed"):
            await other.result()
        assert not active.ended
