"""Where the search for queued jobs begins."""

import math

from darkroom_server.ledger.postgres.front import MARGIN_SECONDS, Front
from tests.server.clock import Clock


def looked(front: Front, first: float | None, now: float) -> float:
    front.asked()
    front.found(first, now)
    return front.goal


def test_it_follows_the_earliest_goal(clock: Clock) -> None:
    clock.stop()
    front = Front()
    assert front.goal == -math.inf
    assert looked(front, 100.0, 1000.0) == 100.0
    # An empty queue: what comes is not much older than now.
    assert looked(front, None, 1000.0) == 1000.0 - MARGIN_SECONDS
    assert looked(front, 2000.0, 1001.0) == 1001.0 - MARGIN_SECONDS


def test_a_job_that_returns_is_found(clock: Clock) -> None:
    clock.stop()
    front = Front()
    looked(front, None, 1000.0)
    front.back(50.0)
    assert front.asked() == 50.0
    front.back(40.0)  # Too late for this search.
    front.found(50.0, 1001.0)
    assert front.goal == 40.0
    assert looked(front, 60.0, 1002.0) == 60.0


def test_it_begins_again_after_a_while_and_if_the_clock_is_set_back(clock: Clock) -> None:
    clock.stop()
    front = Front()
    looked(front, None, 1000.0)
    assert front.asked() > -math.inf
    clock.skip(61.0)
    assert front.asked() == -math.inf
    front.found(None, 1061.0)
    assert front.goal > -math.inf
    assert looked(front, None, 1060.0) == -math.inf
