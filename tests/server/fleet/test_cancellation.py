"""How long a job goes on that is cancelled at another server, by the clock of its engine: steps."""

import grpc
import pytest

from darkroom_server.core.events import Event, JobCancelled, SampleProgress
from tests.server.fleet.conftest import Servers
from tests.server.rpc.test_idempotency import cancel
from tests.server.streams import rest, submit, until, watch
from tests.server.wire import Wire, refusal

pytestmark = pytest.mark.needs("postgresql")


def steps_in(wire: Wire) -> dict[str, int]:
    """How many steps each job in the engine has done, by request id."""
    with wire.engine._lock:
        residents = wire.engine._residents.values()
        return {each.job.request_id: each.step for each in residents}


async def test_a_cancel_through_another_server_needs_no_step_and_the_job_ends_with_the_next(
    servers: Servers,
) -> None:
    a, b = await servers.start("a"), await servers.start("b")
    await submit(a, request_id="stays", steps=1000)
    await submit(a, request_id="goes", steps=1000)
    following = watch(b, "goes")
    await a.subscribers("goes", 1)
    a.engine.advance(3)
    await until(following, "progress")
    # The engine is between two steps now, and begins none until the test says so.
    assert await cancel(b, "goes")
    assert await a.cancelled.get()
    assert (await refusal(rest(following))).code is grpc.StatusCode.CANCELLED
    assert steps_in(a) == {"stays": 3, "goes": 3}
    a.engine.advance()
    assert steps_in(a) == {"stays": 4}


async def test_an_engine_in_motion_does_at_most_one_step_after_a_cancel_has_reached_it(
    servers: Servers,
) -> None:
    a = await servers.start("a", fake={"pass_seconds": 0.02})
    b = await servers.start("b")
    happened: list[tuple[str, str]] = []
    emit = a.engine._emit

    def observe(event: Event) -> None:
        match event:
            case SampleProgress(job_id=job):
                happened.append((job, "step"))
            case JobCancelled(job_id=job):
                happened.append((job, "removed"))
        emit(event)

    a.engine._emit = observe
    a.engine._on_cancel = lambda job: happened.append((job, "cancel"))
    for number in range(6):
        # Each goes on for 20 s, however long its cancel takes; the next one shows that the engine
        # has gone on too, and that only this one ended.
        await submit(a, request_id=f"job{number}", steps=1000)
        job = (await a.submitted.get()).id
        await a.becomes(lambda job=job: (job, "step") in happened)  # type: ignore[misc]
        assert await cancel(b, f"job{number}")
        await a.becomes(lambda job=job: (job, "removed") in happened)  # type: ignore[misc]
        what = [what for each, what in happened if each == job]
        assert what[: what.index("cancel")] == ["step"] * what.index("cancel")
        assert what[what.index("cancel") :] in (
            ["cancel", "removed"],
            ["cancel", "step", "removed"],
        )
