import pytest

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import QuotaExceeded
from darkroom_server.dispatch.admission.quotas import (
    BESIDES_JOBS,
    PER_JOB,
    ConcurrentCallLimiter,
)

ME, YOU = Caller(name="me"), Caller(name="you")


def test_a_job_has_so_many_and_another_has_its_own() -> None:
    seats = ConcurrentCallLimiter(max_jobs=1)
    leaves = [seats.acquire(ME, "a") for _ in range(PER_JOB)]
    with pytest.raises(QuotaExceeded, match="end one of them") as caught:
        seats.acquire(ME, "a")
    assert caught.value.subject == "request:a"
    seats.acquire(ME, "b")
    seats.acquire(YOU, "a")  # Another job, though of the same id.
    leaves.pop()()
    seats.acquire(ME, "a")


def test_a_caller_has_one_for_each_job_and_some_more() -> None:
    seats = ConcurrentCallLimiter(max_jobs=3)
    leaves = [seats.acquire(ME, str(n)) for n in range(3 + BESIDES_JOBS)]
    with pytest.raises(QuotaExceeded, match="read them to the end") as caught:
        seats.acquire(ME, "x")
    assert caught.value.subject == "caller:me"
    seats.acquire(YOU, "x")
    leaves.pop()()
    seats.acquire(ME, "x")
