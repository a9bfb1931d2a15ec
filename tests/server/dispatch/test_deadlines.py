import math
import time

import pytest

from darkroom_server.core.errors import DeadlineExceeded
from darkroom_server.dispatch import JobOutcome
from tests.server.clock import Clock
from tests.server.dispatch.desk import dispatching, settle
from tests.server.jobs import make_job


@pytest.mark.parametrize("later", [600.0, math.inf])
async def test_a_later_deadline_that_comes_too_late_for_the_engine(
    later: float, clock: Clock
) -> None:
    async with dispatching() as (dispatcher, engine):
        first = time.monotonic() + 300
        accepted = dispatcher.submit(make_job("a", image_count=2, deadline=first))
        with accepted.subscribe():
            engine.deliver("a", 0)
            await settle()
            engine.expire("a")  # And before this is heard, somebody joins who has more time.
            dispatcher.join(accepted, None if math.isinf(later) else first + later)
            clock.skip(300)
            await settle()
            assert not accepted.ended
            (again,) = engine.jobs
            assert (again.id, again.image_indices) == ("a", [1])
            engine.advance(4)
            assert len((await accepted.result()).images) == 2
        assert dispatcher.counts.by_end[JobOutcome.FINISHED] == 1


async def test_what_was_all_drawn_when_the_engine_let_it_go_is_finished() -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job("a", deadline=time.monotonic() + 300))
        engine.deliver("a", 0)
        engine.expire("a")
        dispatcher.join(accepted, None)
        assert (await accepted.result()).images
        assert not engine.jobs


async def test_a_deadline_that_has_passed_ends_the_job(clock: Clock) -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job("a", deadline=time.monotonic() + 300))
        clock.skip(300)
        engine.expire("a")
        with pytest.raises(DeadlineExceeded):
            await accepted.result()
        await settle()
        assert not dispatcher.running_jobs + dispatcher.queued_jobs
