import pytest

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import QuotaExceeded
from darkroom_server.dispatch.admission.quotas import (
    BESIDES_JOBS,
    PER_JOB,
    ConcurrentCallLimiter,
)

ME, YOU = Caller(name="me"), Caller(name="you")


def test_each_job_has_its_own_call_limit() -> None:
    limiter = ConcurrentCallLimiter(max_jobs=1)
    releases = [limiter.acquire(ME, "a") for _ in range(PER_JOB)]
    with pytest.raises(QuotaExceeded, match="end one of them") as caught:
        limiter.acquire(ME, "a")
    assert caught.value.subject == "request:a"
    limiter.acquire(ME, "b")
    limiter.acquire(YOU, "a")  # Another caller's job of the same id.
    releases.pop()()
    limiter.acquire(ME, "a")


def test_a_caller_has_one_call_for_each_job_and_some_more() -> None:
    limiter = ConcurrentCallLimiter(max_jobs=3)
    releases = [limiter.acquire(ME, str(n)) for n in range(3 + BESIDES_JOBS)]
    with pytest.raises(QuotaExceeded, match="read them to the end") as caught:
        limiter.acquire(ME, "x")
    assert caught.value.subject == "caller:me"
    limiter.acquire(YOU, "x")
    releases.pop()()
    limiter.acquire(ME, "x")
