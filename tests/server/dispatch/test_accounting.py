"""Every accepted job is counted once when it ends, under random actions."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom_server.core.errors import DarkroomError, DeadlineExceeded, Failure, QueueFull, Reason
from darkroom_server.dispatch import ActiveJob, Finished, JobOutcome
from tests.server.dispatch.harness import dispatching, settle
from tests.server.jobs import make_job


@dataclass(frozen=True)
class Submit:
    images: int
    steps: int
    expires_at_once: bool


@dataclass(frozen=True)
class Cancel:
    index: int


@dataclass(frozen=True)
class Advance:
    batches: int


@dataclass(frozen=True)
class Fail:
    index: int


action_types = st.one_of(
    st.builds(Submit, st.integers(1, 3), st.integers(1, 4), st.booleans()),
    st.builds(Cancel, st.integers(0, 30)),
    st.builds(Advance, st.integers(0, 3)),
    st.builds(Fail, st.integers(0, 30)),
)


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(action_types, max_size=40), dies=st.booleans())
def test_accepted_is_finished_plus_failed_plus_cancelled(
    actions: list[Submit | Cancel | Advance | Fail], dies: bool
) -> None:
    asyncio.run(run(actions, dies))


async def run(actions: list[Submit | Cancel | Advance | Fail], dies: bool) -> None:
    jobs: list[ActiveJob] = []
    cancelled: set[str] = set()
    async with dispatching(max_queued_jobs=3, max_resident_samples=2) as (dispatcher, engine):
        for number, action in enumerate(actions):
            match action:
                case Submit(images, steps, expires_at_once):
                    deadline = time.monotonic() + (1e-4 if expires_at_once else 60)
                    job = make_job(str(number), image_count=images, steps=steps, deadline=deadline)
                    with suppress(QueueFull, DeadlineExceeded):
                        jobs.append(dispatcher.submit(job))
                case Cancel(index) if jobs:
                    chosen = jobs[index % len(jobs)]
                    if not chosen.ended:
                        cancelled.add(chosen.job.id)
                    dispatcher.cancel(chosen.job.id)
                case Advance(batches):
                    engine.advance(batches)
                case Fail(index) if engine.jobs:
                    inside = engine.jobs
                    broken = Failure(Reason.NON_FINITE, "not a number")
                    engine.fail(inside[index % len(inside)].id, broken)
            await settle()
            counts = dispatcher.counts
            assert counts.accepted == len(jobs)
            assert counts.live == sum(not job.ended for job in jobs)
            assert sum(job.image_count for job in engine.jobs) <= 2 + 3 - 1
            assert dispatcher.running_jobs == len(engine.jobs)
        if dies:
            engine.die()
            await settle()
            while not dispatcher.ready:
                await settle()
        while engine.jobs:
            engine.advance()
            await settle()
        await settle()
        ends = dict.fromkeys(JobOutcome, 0)
        for active in jobs:
            if active.job.id in cancelled:
                continue
            try:
                result = await asyncio.wait_for(active.result(), 5)
            except DarkroomError as error:
                expired = error.reason is Reason.DEADLINE_EXPIRED
                ends[JobOutcome.EXPIRED if expired else JobOutcome.FAILED] += 1
            else:
                assert isinstance(result, Finished)
                assert len(result.images) == active.job.image_count
                ends[JobOutcome.FINISHED] += 1
        counted = dispatcher.counts
        assert counted.live == 0
        assert counted.accepted == counted.ended
        assert counted.by_end[JobOutcome.FINISHED] == ends[JobOutcome.FINISHED]
        assert counted.by_end[JobOutcome.FAILED] == ends[JobOutcome.FAILED]
        assert (dispatcher.queued_jobs, dispatcher.running_jobs) == (0, 0)
