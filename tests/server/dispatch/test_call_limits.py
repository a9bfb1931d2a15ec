import pytest

from darkroom_server.core.errors import QuotaExceeded
from darkroom_server.dispatch.admission.quotas import (
    BESIDES_JOBS,
    PER_JOB,
    ConcurrentCallLimiter,
)


def test_each_job_has_its_own_call_limit() -> None:
    limiter = ConcurrentCallLimiter(max_jobs=1)
    releases = [limiter.acquire("me", "a") for _ in range(PER_JOB)]
    with pytest.raises(QuotaExceeded, match="end one of them") as caught:
        limiter.acquire("me", "a")
    assert caught.value.subject == "request:a"
    limiter.acquire("me", "b")
    limiter.acquire("you", "a")  # Another caller's job of the same id.
    releases.pop()()
    limiter.acquire("me", "a")


def test_a_caller_has_one_call_for_each_job_and_some_more() -> None:
    limiter = ConcurrentCallLimiter(max_jobs=3)
    releases = [limiter.acquire("me", str(n)) for n in range(3 + BESIDES_JOBS)]
    with pytest.raises(QuotaExceeded, match="read them to the end") as caught:
        limiter.acquire("me", "x")
    assert caught.value.subject == "caller:me"
    limiter.acquire("you", "x")
    releases.pop()()
    limiter.acquire("me", "x")
