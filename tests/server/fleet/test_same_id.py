"""Two servers that begin one id at once: until the ledger has answered, neither answers for it."""

import asyncio
from typing import Any

import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.core.caller import ANONYMOUS
from darkroom_server.core.ledger import Key
from tests.server.fleet.conftest import HeldAnswers, Servers
from tests.server.rpc.test_idempotency import cancel
from tests.server.rpc.test_jobs import name, page, state_of
from tests.server.streams import assembled, kind, rest, submit, watch
from tests.server.wire import Wire

pytestmark = pytest.mark.needs("postgresql")

KEY = Key(ANONYMOUS.name, "job")
KEPT: dict[str, Any] = {
    "request_id": "job",
    "steps": 5,
    "on_disconnect": generation_pb2.ON_DISCONNECT_KEEP,
}


@pytest.fixture
async def fleet(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> tuple[Wire, Wire]:
    """The first one has the job; the engine of the other finishes whatever it gets at once."""
    a, b = await servers.start("a"), await servers.start("b", fake={"auto": True})
    await submit(a, request_id="job", steps=5)
    await servers.becomes(lambda states: states == {"job": 1})
    return a, b


async def begun_twice(wire: Wire, held: HeldAnswers) -> "asyncio.Task[Any]":
    """A call of the id at ``wire``, whose engine has finished it, and whose commit is answered."""
    call = wire.generating(**KEPT)
    await held.committed.wait()
    local = wire.server.results.local(KEY)
    assert local is not None
    await wire.becomes(lambda: local.finished)
    return call


async def test_calls_wait_until_the_ledger_has_said_whose_job_it_is(
    fleet: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = fleet
    held = HeldAnswers(b, monkeypatch)
    call = await begun_twice(b, held)
    watching = asyncio.create_task(rest(watch(b, "job")))
    getting = asyncio.create_task(state_of(b, "job"))
    listing = asyncio.create_task(page(b))
    await b.becomes(lambda: held.asked >= 3)
    held.release.set()
    (listed,) = (await listing).generations
    for state in (await getting, listed):
        assert (name(state.state), state.finished_images) == ("RUNNING", 0)
    a.engine.advance(5)
    responses = await watching
    assert kind(responses[-1]) == "finished"
    watched = assembled([r.event.image for r in responses if kind(r) == "image"])
    mine = assembled([r.event.image for r in await rest(watch(a, "job")) if kind(r) == "image"])
    answer = await call
    assert watched == mine == {0: answer.images[0].data}
    # The other generation was another image, which nobody has seen.
    ignored = (await b.submitted.get()).seed
    assert ignored != answer.images[0].seed


async def test_a_cancel_reaches_the_job_that_counts(
    fleet: tuple[Wire, Wire], servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = fleet
    held = HeldAnswers(b, monkeypatch)
    call = await begun_twice(b, held)
    cancelling = asyncio.create_task(cancel(b, "job"))
    await b.becomes(lambda: held.asked >= 1)
    held.release.set()
    assert await cancelling
    assert await a.cancelled.get()
    await servers.becomes(lambda states: states == {"job": 5})
    with pytest.raises(Exception, match="cancelled"):
        await call


async def test_who_follows_a_job_elsewhere_is_not_shown_one_that_begins_here(
    fleet: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = fleet
    member = b.server._fleet.member  # type: ignore[union-attr]
    mirror = await member.find(KEY)
    await a.subscribers("job", 1)  # It follows the job there, and looks no more.
    entry = await member._ledger.find(KEY)
    assert entry is not None
    held = HeldAnswers(b, monkeypatch)
    call = await begun_twice(b, held)
    # As after a connection between the servers that broke.
    following = asyncio.create_task(member._mirrors._repeat_entry(entry, mirror))
    await b.becomes(lambda: held.asked >= 1)
    assert not mirror.images
    held.release.set()
    with mirror.subscribe():
        a.engine.advance(5)
        await following
        (image,) = (await mirror.result()).images
    assert image.data == (await call).images[0].data
