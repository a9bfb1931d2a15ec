import pytest

from darkroom_server.core.errors import QuotaExceeded
from darkroom_server.dispatch.admission.quotas import (
    BESIDES_JOBS,
    PER_JOB,
    ConcurrentCallLimiter,
)


def test_a_job_has_so_many_and_another_has_its_own() -> None:
    seats = ConcurrentCallLimiter(max_jobs=1)
    leaves = [seats.acquire("me", "a") for _ in range(PER_JOB)]
    with pytest.raises(QuotaExceeded, match="end one of them") as caught:
        seats.acquire("me", "a")
    assert caught.value.subject == "request:a"
    seats.acquire("me", "b")
    seats.acquire("you", "a")  # Another job, though of the same id.
    leaves.pop()()
    seats.acquire("me", "a")


def test_a_caller_has_one_for_each_job_and_some_more() -> None:
    seats = ConcurrentCallLimiter(max_jobs=3)
    leaves = [seats.acquire("me", str(n)) for n in range(3 + BESIDES_JOBS)]
    with pytest.raises(QuotaExceeded, match="read them to the end") as caught:
        seats.acquire("me", "x")
    assert caught.value.subject == "caller:me"
    seats.acquire("you", "x")
    leaves.pop()()
    seats.acquire("me", "x")
