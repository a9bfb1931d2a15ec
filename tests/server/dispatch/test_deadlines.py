import math
import time

import pytest

from darkroom_server.core.errors import DeadlineExceeded
from darkroom_server.dispatch import JobOutcome
from tests.server.clock import Clock
from tests.server.dispatch.harness import dispatching, settle
from tests.server.jobs import make_job


@pytest.mark.parametrize("later", [600.0, math.inf])
async def test_a_deadline_extended_after_the_engine_expired_the_job(
    later: float, clock: Clock
) -> None:
    async with dispatching() as (dispatcher, engine):
        first = time.monotonic() + 300
        active = dispatcher.submit(make_job("a", image_count=2, deadline=first))
        with active.subscribe():
            engine.deliver("a", 0)
            await settle()
            engine.expire("a")
            # A call with more time joins before the dispatcher handles that event.
            dispatcher.join(active, None if math.isinf(later) else first + later)
            clock.skip(300)
            await settle()
            assert not active.ended
            (again,) = engine.jobs
            assert (again.id, again.image_indices) == ("a", [1])
            engine.advance(4)
            assert len((await active.result()).images) == 2
        assert dispatcher.counts.by_end[JobOutcome.FINISHED] == 1


async def test_a_job_whose_images_were_finished_before_it_expired_is_finished() -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job("a", deadline=time.monotonic() + 300))
        engine.deliver("a", 0)
        engine.expire("a")
        dispatcher.join(active, None)
        assert (await active.result()).images
        assert not engine.jobs


async def test_a_deadline_that_has_passed_expires_the_job(clock: Clock) -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job("a", deadline=time.monotonic() + 300))
        clock.skip(300)
        engine.expire("a")
        with pytest.raises(DeadlineExceeded):
            await active.result()
        await settle()
        assert not dispatcher.running_jobs + dispatcher.queued_jobs
