"""What every ledger promises; each test runs against each of them."""

import asyncio
from typing import Any

import pytest

from darkroom_server.core.errors import (
    Failure,
    QueueFull,
    QuotaExceeded,
    Reason,
    RequestConflict,
    Violation,
)
from darkroom_server.core.ledger import Hold, Key, Ledger, Models, Standing
from darkroom_server.ledger.input_limits import InputLimits
from tests.server.clock import Clock
from tests.server.ledger.conftest import MakeLedger, draft

FAILURE = Failure(
    Reason.NON_FINITE, "not a number", {"step": "3"}, (Violation("prompt", "is too bright"),)
)


async def standing(ledger: Ledger, id: str = "job") -> Standing | None:
    entry = await ledger.find(Key("ada", id))
    return None if entry is None else entry.standing


def of(*models: str, runtime: str = "fast") -> Models:
    return Models(held=dict.fromkeys(models, runtime))


async def ended(ledger: Ledger, id: str, standing: Standing = Standing.FINISHED) -> Hold:
    begun = await ledger.begin(draft(id), claimed=True)
    assert await ledger.end(begun.entry.hold, standing)
    return begun.entry.hold


async def test_a_job_from_its_acceptance_to_its_end(ledger: Ledger) -> None:
    begun = await ledger.begin(draft(detached=True), claimed=False)
    assert begun.new
    assert (begun.entry.standing, begun.entry.owner) == (Standing.QUEUED, None)
    assert (begun.entry.record, begun.entry.model) == (b"record of job", "demo")
    (claimed,) = await ledger.claim(5)
    assert (claimed.standing, claimed.epoch) == (Standing.CLAIMED, begun.entry.epoch + 1)
    assert claimed.owner == (await ledger.servers())[0].id
    assert await ledger.claim(5) == []
    assert await ledger.end(claimed.hold, Standing.FAILED, FAILURE)
    entry = await ledger.find(claimed.key)
    assert entry is not None
    assert (entry.standing, entry.failure, entry.detached) == (Standing.FAILED, FAILURE, True)
    assert [each.key for each in await ledger.mine()] == [claimed.key]
    assert await ledger.find(Key("bob", "job")) is None


async def test_two_begins_of_one_id_are_one_job(ledger: Ledger) -> None:
    twins = await asyncio.gather(*(ledger.begin(draft(), claimed=True) for _ in range(5)))
    assert [each.new for each in twins].count(True) == 1
    assert len({each.entry.hold for each in twins}) == 1
    with pytest.raises(RequestConflict):
        await ledger.begin(draft(fingerprint=b"other"), claimed=True)
    # Another caller's job of the same id is another job.
    assert (await ledger.begin(draft(caller="bob", fingerprint=b"other"), claimed=True)).new


async def test_a_later_begin_extends_a_job(ledger: Ledger, clock: Clock) -> None:
    clock.stop()
    await ledger.begin(draft(deadline=10.0, age=2.0), claimed=True)
    entry = await ledger.find(Key("ada", "job"))
    assert entry is not None
    assert entry.remaining == pytest.approx(8.0)
    assert entry.age == pytest.approx(2.0)
    earlier = await ledger.begin(draft(deadline=5.0), claimed=True)
    assert earlier.entry.remaining == pytest.approx(8.0)
    later = await ledger.begin(draft(deadline=30.0, detached=True), claimed=True)
    assert later.entry.remaining == pytest.approx(30.0)
    assert later.entry.detached
    never = await ledger.begin(draft(), claimed=True)
    assert (never.entry.remaining, never.entry.detached) == (None, True)
    # What has no deadline gets none from a later call.
    assert (await ledger.begin(draft(deadline=1.0), claimed=True)).entry.remaining is None


async def test_a_finished_job_is_found_and_a_failed_one_begins_again(ledger: Ledger) -> None:
    hold = await ended(ledger, "good")
    found = await ledger.begin(draft("good"), claimed=True)
    assert not found.new
    assert (found.entry.standing, found.entry.hold) == (Standing.FINISHED, hold)
    for outcome in (Standing.FAILED, Standing.EXPIRED, Standing.CANCELLED):
        before = await ended(ledger, "bad", outcome)
        again = await ledger.begin(draft("bad"), claimed=True)
        assert again.new
        assert again.entry.epoch > before.epoch
        assert not await ledger.end(before, Standing.FINISHED)
        assert await ledger.end(again.entry.hold, outcome)


async def test_the_nearest_goal_is_claimed_first(ledger: Ledger) -> None:
    for id, goal, model in (("late", 9.0, "a"), ("soon", 1.0, "b"), ("next", 3.0, "a")):
        await ledger.begin(draft(id, goal=goal, model=model), claimed=False)
    assert [each.key.request_id for each in await ledger.claim(1, models=of("a"))] == ["next"]
    assert await ledger.claim(5, models=of()) == []
    (named,) = await ledger.claim(5, key=Key("ada", "late"))
    assert named.key.request_id == "late"
    assert [each.key.request_id for each in await ledger.claim(5)] == ["soon"]


async def test_a_claim_ends_the_queued_jobs_whose_deadline_has_passed(
    ledger: Ledger, clock: Clock
) -> None:
    clock.stop()
    await ledger.begin(draft("running", deadline=5.0), claimed=True)
    for id, fields in (
        ("late", {"deadline": 5.0, "model": "other", "inputs": {"a": b"1"}}),
        ("named", {"deadline": 5.0}),
        ("also late", {"deadline": 2.0, "needs": frozenset({"nobody has it"})}),
        ("early", {"deadline": 5.1}),
        ("next", {}),
    ):
        await ledger.begin(draft(id, **fields), claimed=False)
    changes = ledger.changes()
    clock.skip(5.0)
    # The server that has a job in its own queue watches the deadline itself.
    (named,) = await ledger.claim(1, models=of("demo"), key=Key("ada", "named"))
    assert named.standing is Standing.CLAIMED
    assert await standing(ledger, "late") is Standing.QUEUED
    claimed = await ledger.claim(5, models=of("demo"))
    assert [each.key.request_id for each in claimed] == ["early", "next"]
    assert {(await anext(changes)).request_id for _ in range(5)} == {
        *("named", "late", "also late", "early", "next")
    }
    for id in ("late", "also late"):
        entry = await ledger.find(Key("ada", id))
        assert entry is not None
        assert entry.failure is not None
        assert (entry.standing, entry.failure.reason) == (
            Standing.EXPIRED,
            Reason.DEADLINE_EXPIRED,
        )
        assert entry.ended_for == pytest.approx(0.0)
    assert await ledger.inputs(Key("ada", "late")) == {}
    assert await standing(ledger, "running") is Standing.CLAIMED
    # Also if nothing is claimed.
    await ledger.begin(draft("third", deadline=5.0), claimed=False)
    clock.skip(5.0)
    assert await ledger.claim(5, models=of()) == []
    assert await standing(ledger, "third") is Standing.EXPIRED


async def test_an_exact_job_that_began_runs_only_on_its_own_runtime(ledger: Ledger) -> None:
    fast, slow = of("demo"), of("demo", runtime="slow")
    await ledger.begin(draft("here", runtime="fast"), claimed=True)
    assert (await ledger.find(Key("ada", "here"))).runtime == "fast"  # type: ignore[union-attr]
    # One that waits has none yet, and gets that of the server that claims it.
    await ledger.begin(draft("waits", runtime="fast"), claimed=False)
    (claimed,) = await ledger.claim(5, models=slow)
    assert (claimed.key.request_id, claimed.runtime) == ("waits", "slow")
    await ledger.release([claimed.hold])
    assert await ledger.claim(5, models=fast) == []
    (claimed,) = await ledger.claim(5, models=slow)
    assert claimed.runtime == "slow"
    # Any other job runs on any.
    await ledger.begin(draft("usual"), claimed=False)
    for models in (fast, slow):
        (usual,) = await ledger.claim(5, models=models)
        assert (usual.key.request_id, usual.runtime) == ("usual", None)
        await ledger.release([usual.hold])


async def test_only_a_server_that_offers_what_a_job_needs_claims_it(ledger: Ledger) -> None:
    night, day, both = ({f"adapter {name} of demo" for name in names} for names in ("n", "d", "nd"))
    for id, needs in (("none", set()), ("night", night), ("both", both)):
        await ledger.begin(draft(id, needs=frozenset(needs)), claimed=False)
    waiting = await ledger.find(Key("ada", "both"))
    assert waiting is not None
    assert waiting.needs == both

    async def claimed(offers: set[str] | None, room: int = 5) -> list[str]:
        models = Models(held={"demo": "fast"}, offers=None if offers is None else frozenset(offers))
        entries = await ledger.claim(room, models=models)
        await ledger.release([entry.hold for entry in entries])
        return [entry.key.request_id for entry in entries]

    assert await claimed(set()) == ["none"]
    # What it cannot run takes no room of what it can.
    assert await claimed(day, room=1) == ["none"]
    assert await claimed(night) == ["none", "night"]
    assert await claimed({*both, "adapter n of another"}) == ["none", "night", "both"]
    assert await claimed(None) == ["none", "night", "both"]
    # A job that is named is claimed whatever it needs.
    assert len(await ledger.claim(1, key=Key("ada", "both"))) == 1


async def test_only_the_owner_of_this_epoch_ends_or_releases_a_job(ledger: Ledger) -> None:
    begun = await ledger.begin(draft(), claimed=True)
    hold = begun.entry.hold
    assert await ledger.release([hold]) == 1
    assert await standing(ledger) is Standing.QUEUED
    # What it released is no longer its own, even before another server claims it.
    assert not await ledger.end(hold, Standing.FAILED, FAILURE)
    assert await ledger.release([hold]) == 0
    (claimed,) = await ledger.claim(1)
    assert claimed.losses == 0
    assert not await ledger.end(hold, Standing.FINISHED)
    assert await ledger.release([hold]) == 0
    assert await standing(ledger) is Standing.CLAIMED
    assert await ledger.end(claimed.hold, Standing.FINISHED)
    assert not await ledger.end(claimed.hold, Standing.FAILED)


async def test_the_server_that_accepted_a_queued_job_may_end_it(ledger: Ledger) -> None:
    begun = await ledger.begin(draft(), claimed=False)
    assert await ledger.end(begun.entry.hold, Standing.EXPIRED)
    assert await standing(ledger) is Standing.EXPIRED


async def test_only_a_queued_job_is_cancelled_here(ledger: Ledger) -> None:
    assert await ledger.cancel(Key("ada", "job")) is None
    begun = await ledger.begin(draft(), claimed=False)
    cancelled = await ledger.cancel(begun.entry.key)
    assert cancelled is not None
    assert cancelled.standing is Standing.CANCELLED
    assert await ledger.claim(1) == []
    running = await ledger.begin(draft("running"), claimed=True)
    left = await ledger.cancel(running.entry.key)
    assert left is not None
    assert left.standing is Standing.CLAIMED


async def test_a_finished_job_runs_again_for_one_server(ledger: Ledger) -> None:
    hold = await ended(ledger, "job")
    first, second = await asyncio.gather(ledger.again(hold.key, ""), ledger.again(hold.key, ""))
    assert first is not None
    assert second is None
    assert (first.standing, first.epoch) == (Standing.CLAIMED, hold.epoch + 1)
    assert await ledger.end(first.hold, Standing.FINISHED)
    await ended(ledger, "bad", Standing.FAILED)
    assert await ledger.again(Key("ada", "bad"), "") is None
    assert await ledger.again(Key("ada", "unknown"), "") is None
    # A server that cannot run it does not claim it.
    (there,) = [await ended(ledger, "there")]
    elsewhere = await ledger.again(there.key, None)
    assert elsewhere is None or elsewhere.standing is Standing.QUEUED


async def test_a_quota_counts_what_has_not_ended(ledger: Ledger) -> None:
    holds = [
        (await ledger.begin(draft(str(n), max_live=2), claimed=bool(n))).entry.hold
        for n in range(2)
    ]
    with pytest.raises(QuotaExceeded, match="2 jobs of 'ada'"):
        await ledger.begin(draft("third", max_live=2), claimed=True)
    assert await standing(ledger, "third") is None
    assert (await ledger.begin(draft("other", "bob", max_live=2), claimed=True)).new
    assert not (await ledger.begin(draft("0", max_live=2), claimed=True)).new
    await ledger.end(holds[1], Standing.CANCELLED)
    fifty = await asyncio.gather(
        *(ledger.begin(draft(f"many{n}", max_live=2), claimed=True) for n in range(50)),
        return_exceptions=True,
    )
    assert sum(not isinstance(each, QuotaExceeded) for each in fifty) == 1


async def test_inputs_go_with_the_last_job_that_names_them(make: MakeLedger) -> None:
    ledger = await make(inputs=InputLimits(together=10))
    one = await ledger.begin(draft("one", inputs={"a": b"12345"}), claimed=True)
    two = await ledger.begin(draft("two", inputs={"a": b"12345", "b": b"678"}), claimed=False)
    assert await ledger.inputs(two.entry.key) == {"a": b"12345", "b": b"678"}
    assert await ledger.inputs(Key("ada", "unknown")) == {}
    with pytest.raises(QueueFull, match="8 bytes in the ledger, of 10"):
        await ledger.begin(draft("three", inputs={"c": b"123"}), claimed=True)
    assert await standing(ledger, "three") is None
    # A finished job may run again, so it keeps its inputs, but a new one matters more.
    await ledger.end(one.entry.hold, Standing.FINISHED)
    assert await ledger.inputs(one.entry.key) == {"a": b"12345"}
    await ledger.end(two.entry.hold, Standing.CANCELLED)
    assert await ledger.inputs(one.entry.key) == {"a": b"12345"}
    assert (await ledger.begin(draft("four", inputs={"c": b"1234567"}), claimed=True)).new
    assert await standing(ledger, "one") is None
    assert await ledger.inputs(Key("ada", "four")) == {"c": b"1234567"}


async def test_the_inputs_of_one_caller_have_a_limit_of_their_own(make: MakeLedger) -> None:
    ledger = await make(inputs=InputLimits(together=20, of_caller=8))
    await ledger.begin(draft("one", inputs={"a": b"12345"}), claimed=True)
    # A file that several of its jobs share counts once, and for each caller.
    two = await ledger.begin(draft("two", inputs={"a": b"12345", "b": b"123"}), claimed=False)
    assert (await ledger.begin(draft("one", "bob", inputs={"a": b"12345"}), claimed=True)).new
    with pytest.raises(
        QuotaExceeded, match=r"'ada' would have 9 bytes.*8 are kept for one"
    ) as full:
        await ledger.begin(draft("three", inputs={"c": b"1"}), claimed=True)
    assert full.value.subject == "caller:ada"
    assert await standing(ledger, "three") is None
    assert (await ledger.begin(draft("two", "bob", inputs={"c": b"1"}), claimed=True)).new
    # What can never fit says so, and not to wait.
    with pytest.raises(QuotaExceeded, match=r"^the images of this request have 9 bytes"):
        await ledger.begin(draft("large", "cleo", inputs={"d": b"123456789"}), claimed=True)
    # Its own finished jobs make room, and nobody else's.
    bobs = (await ledger.find(Key("bob", "two"))).hold
    assert await ledger.end(bobs, Standing.FINISHED)
    assert await ledger.end(two.entry.hold, Standing.FINISHED)
    assert (await ledger.begin(draft("three", inputs={"c": b"1"}), claimed=True)).new
    assert await standing(ledger, "two") is None
    assert await ledger.inputs(Key("ada", "one")) == {"a": b"12345"}
    assert await ledger.find(bobs.key) is not None


async def test_fifty_begins_with_inputs_take_no_more_than_a_caller_may(make: MakeLedger) -> None:
    ledger = await make(inputs=InputLimits(of_caller=7))
    fifty = await asyncio.gather(
        *(ledger.begin(draft(f"{n}", inputs={f"{n}": b"1"}), claimed=True) for n in range(50)),
        return_exceptions=True,
    )
    assert sum(isinstance(each, QuotaExceeded) for each in fifty) == 43
    assert sum(not isinstance(each, BaseException) for each in fifty) == 7


async def test_what_ended_is_forgotten_after_its_time(ledger: Ledger, clock: Clock) -> None:
    old = await ended(ledger, "old")
    await ledger.begin(draft("running"), claimed=True)
    clock.skip(200)
    await ended(ledger, "new")
    clock.skip(150)
    await ledger.renew()
    assert [entry.key.request_id for entry in await ledger.mine()] == ["running", "new"]
    new = await ledger.find(Key("ada", "new"))
    assert new is not None
    assert new.ended_for == pytest.approx(150, abs=5)
    assert await ledger.find(old.key) is None


async def test_only_what_ended_is_forgotten_on_demand(ledger: Ledger) -> None:
    running = (await ledger.begin(draft("running"), claimed=True)).entry.hold
    done = await ended(ledger, "done")
    await ledger.forget([running, Hold(done.key, done.epoch + 1)])
    assert await standing(ledger, "done") is Standing.FINISHED
    await ledger.forget([done])
    assert await standing(ledger, "done") is None
    assert await standing(ledger, "running") is Standing.CLAIMED


async def test_changes_are_published(ledger: Ledger) -> None:
    changes = ledger.changes()
    begun = await ledger.begin(draft("one"), claimed=False)
    await ledger.cancel(begun.entry.key)
    await ended(ledger, "two")
    seen: list[Any] = [(await anext(changes)).request_id for _ in range(4)]
    assert seen == ["one", "one", "two", "two"]


async def test_the_server_is_listed(ledger: Ledger) -> None:
    (server,) = await ledger.servers()
    assert server.name == "here"
    assert server.age >= 0
