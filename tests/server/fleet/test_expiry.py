"""Jobs that wait in the ledger until it is too late for them."""

import asyncio

import grpc
import pytest

from darkroom_server.ledger.postgres.session import CHANNEL, Session
from darkroom_server.settings import Dispatch
from tests.server.fleet.conftest import Servers
from tests.server.streams import rest, submit, until, watch
from tests.server.wire import refusal

pytestmark = pytest.mark.needs("postgresql")


async def test_a_late_job_ends_when_another_one_is_claimed(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = 0

    async def nothing(_: Session) -> None:
        """What a beat does with late jobs here."""
        nonlocal beats
        beats += 1

    monkeypatch.setattr(Session, "expire", nothing)
    a = await servers.start("a", dispatch=Dispatch(max_resident_samples=1))
    await submit(a, request_id="runs", steps=5)
    await submit(a, request_id="late", steps=5, time_limit=600)
    await submit(a, request_id="next", steps=5)
    await servers.becomes(lambda states: states == {"runs": 1, "late": 0, "next": 0})
    call = watch(a, "late")
    await until(call, "accepted")  # Before its model is gone.
    watching = asyncio.create_task(refusal(rest(call)))
    # No server has its model any more, so it is not claimed and then found to be late.
    await servers.sql(
        "UPDATE jobs SET model = 'other', deadline = accepted_at, goal = accepted_at "
        f"WHERE request_id = 'late' RETURNING pg_notify('{CHANNEL}', goal::text)"
    )
    before = beats
    await a.becomes(lambda: beats > before + 2)
    assert await servers.states() == {"runs": 1, "late": 0, "next": 0}
    assert not watching.done()
    a.engine.advance(5)
    assert [(await a.submitted.get()).request_id for _ in range(2)] == ["runs", "next"]
    assert (await servers.states())["late"] == 4
    error = await watching
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "the deadline passed before it was begun" in error.message
