"""Calls that ask for no more than their answer: a fleet counts them, and they wait for any room."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.core.caller import ANONYMOUS
from darkroom_server.dispatch import results
from darkroom_server.settings import Dispatch, Security
from tests.server.fleet.conftest import Servers
from tests.server.rpc.test_idempotency import cancel
from tests.server.security.test_tokens import entry
from tests.server.streams import assembled, kind, rest, submit, until
from tests.server.wire import SERVING, Wire, refusal
from tools.postgres import cluster

pytestmark = pytest.mark.needs("postgresql")

ONE = Dispatch(max_resident_samples=1)
ALICE, BOB = ((("authorization", f"Bearer {who}-secret"),) for who in ("alice", "bob"))


def plain(wire: Wire, metadata: Any = (), **fields: Any) -> "asyncio.Task[Any]":
    """A call of ``Generate`` that asks for nothing else."""
    request = generation_pb2.GenerateRequest(prompt="a star", **fields)

    async def call() -> Any:
        return await wire.generation.Generate(request, metadata=metadata)

    return asyncio.create_task(call())


async def stepped(calls: Sequence["asyncio.Task[Any]"], *engines: Wire) -> list[Any]:
    """What the calls return, while ``engines`` take steps."""
    while not all(call.done() for call in calls):
        for each in engines:
            each.engine.advance()
        await asyncio.sleep(0.001)
    return [await call for call in calls]


async def only(servers: Servers, *others: str) -> str:
    """The id of the one job in the ledger besides ``others``, once it is there."""
    await servers.becomes(lambda states: len(states) == len(others) + 1)
    (id,) = (await servers.states()).keys() - set(others)
    return id


@pytest.mark.parametrize("dispatch", [Dispatch(), ONE], ids=["room", "one place"])
async def test_fifty_plain_calls_at_three_servers_are_never_one_too_many(
    servers: Servers, tmp_path: Path, dispatch: Dispatch
) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("alice", "alice-secret", "max_jobs = 5") + entry("bob", "bob-secret"))
    security = Security(tokens=str(tokens))
    fleet = [await servers.start(each, security=security, dispatch=dispatch) for each in "abc"]
    calls = [plain(fleet[n % 3], ALICE, steps=5) for n in range(50)]
    await fleet[0].becomes(lambda: sum(call.done() for call in calls) == 45)
    refused = [call for call in calls if call.done()]
    for call in refused:
        error = await refusal(call)
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.info.reason == "QUOTA_EXCEEDED"
    assert len(await servers.states()) == 5
    # A caller without a quota is not counted, and as long as there is room not written down.
    if dispatch is not ONE:
        bobs = plain(fleet[0], BOB, request_id="bobs", steps=5)
        while (job := await fleet[0].submitted.get()).request_id != "bobs":
            pass
        fleet[0].engine.finish(job.id)
        assert (await bobs).images
        assert len(await servers.states()) == 5
    accepted = [call for call in calls if call not in refused]
    assert all(answer.images for answer in await stepped(accepted, *fleet))
    # Their places are free.
    await servers.becomes(lambda states: set(states.values()) <= {2})
    again = [plain(fleet[n % 3], ALICE, steps=5) for n in range(5)]
    assert all(answer.images for answer in await stepped(again, *fleet))


async def test_a_plain_call_that_finds_no_room_runs_elsewhere(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await servers.start("a", dispatch=ONE), await servers.start("b")
    first = plain(a, steps=5)
    await a.becomes(lambda: a.server.dispatcher.running_jobs == 1)
    assert await servers.states() == {}
    second = plain(a, steps=5, seed=7)
    id = await only(servers)
    job = await b.submitted.get()
    assert (job.request_id, job.seed) == (id, 7)
    await b.subscribers(id, 1)
    b.engine.advance(5)
    answer = await second
    assert answer.request_id == id
    (image,) = answer.images
    assert image.seed == 7
    # The image is that of the other server, whose job is the same.
    assert image.data == (await stepped([plain(b, steps=5, seed=7)], b))[0].images[0].data
    assert a.submitted.qsize() == 1
    streaming = a.stream(steps=5, seed=8)
    await until(streaming, "accepted")
    await b.submitted.get()
    await b.submitted.get()
    (id,) = [id for id, state in (await servers.states()).items() if state == 1]
    await b.subscribers(id, 1)
    b.engine.advance(5)
    responses = await rest(streaming)
    assert kind(responses[-1]) == "finished"
    assert assembled([r.event.image for r in responses if kind(r) == "image"])
    (answer,) = await stepped([first], a)
    assert answer.images


async def test_nothing_is_kept_of_a_plain_call_after_its_answer(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "DELIVERY_SECONDS", 0.05)
    a, b = await servers.start("a", dispatch=ONE), await servers.start("b")
    await submit(a, request_id="runs", steps=1000)
    await servers.becomes(lambda states: states == {"runs": 1})
    call = plain(a, steps=5)
    id = await only(servers, "runs")
    await b.submitted.get()
    await b.subscribers(id, 1)
    b.engine.advance(5)
    assert (await call).images
    await servers.becomes(lambda states: states == {"runs": 1})
    assert b.server.results.kept_bytes == 0
    await b.becomes(lambda: not b.server.results._entries)


async def test_what_has_an_id_is_kept_as_any_result(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "DELIVERY_SECONDS", 0.05)
    a, b = await servers.start("a", dispatch=ONE), await servers.start("b")
    await submit(a, request_id="runs", steps=1000)
    await servers.becomes(lambda states: states == {"runs": 1})
    call = plain(a, request_id="named", steps=5)
    await b.submitted.get()
    await b.subscribers("named", 1)
    b.engine.advance(5)
    image = (await call).images[0]
    await b.becomes(lambda: b.server.results.kept_bytes > 0)
    for wire in (a, b):
        assert (await plain(wire, request_id="named", steps=5)).images[0].data == image.data
    assert b.submitted.empty()


@pytest.mark.parametrize("watched", [False, True])
async def test_a_caller_that_leaves_cancels_its_job_at_another_server(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    # Not because nobody watches it there.
    monkeypatch.setattr(results, "LEASE_SECONDS", 1e6)
    a, b = await servers.start("a", dispatch=ONE), await servers.start("b")
    await submit(a, request_id="runs", steps=1000)
    await servers.becomes(lambda states: states == {"runs": 1})
    call = plain(a, steps=1000)
    id = await only(servers, "runs")
    job = await b.submitted.get()
    if watched:
        await b.subscribers(id, 1)
    call.cancel()
    assert await b.cancelled.get() == job.id
    await servers.becomes(lambda states: states == {"runs": 1, id: 5})
    assert a.cancelled.empty()


async def test_a_caller_that_leaves_cancels_its_job_while_it_waits(servers: Servers) -> None:
    a, b = [await servers.start(each, dispatch=ONE) for each in "ab"]
    for wire, id in ((a, "one"), (b, "two")):
        await submit(wire, request_id=id, steps=1000)
    await servers.becomes(lambda states: states == {"one": 1, "two": 1})
    call = plain(a, steps=1000)
    id = await only(servers, "one", "two")
    call.cancel()
    await servers.becomes(lambda states: states == {"one": 1, "two": 1, id: 5})


@pytest.mark.parametrize("at", ["b", "c"])
async def test_a_call_of_the_same_id_at_another_server_keeps_the_job(
    servers: Servers, at: str
) -> None:
    fleet = {each: await servers.start(each, dispatch=ONE) for each in "ac"}
    fleet["b"] = b = await servers.start("b")
    await submit(fleet["a"], request_id="one", steps=1000)
    await submit(fleet["c"], request_id="two", steps=1000)
    await servers.becomes(lambda states: states == {"one": 1, "two": 1})
    first = plain(fleet["a"], request_id="same", steps=5)
    await b.submitted.get()
    await b.subscribers("same", 1)
    second = plain(fleet[at], request_id="same", steps=5)
    await b.subscribers("same", 2)
    first.cancel()
    await b.subscribers("same", 1)
    mirrors = fleet["a"].server._fleet.member._mirrors  # type: ignore[union-attr]
    await b.becomes(lambda: not mirrors._mirrors and not mirrors._endings)
    assert b.cancelled.empty()
    (answer,) = await stepped([second], b)
    assert answer.images


async def test_a_job_that_waits_for_calls_at_two_servers_is_cancelled_with_neither(
    servers: Servers,
) -> None:
    a, b = [await servers.start(each, dispatch=ONE) for each in "ab"]
    for wire, id in ((a, "one"), (b, "two")):
        await submit(wire, request_id=id, steps=1000)
    await servers.becomes(lambda states: states == {"one": 1, "two": 1})
    first = plain(a, request_id="same", steps=5)
    await only(servers, "one", "two")
    second = plain(b, request_id="same", steps=5)
    await servers.finds(0, "SELECT 1 FROM jobs WHERE calls_at IS NOT NULL")
    first.cancel()
    mirrors = a.server._fleet.member._mirrors  # type: ignore[union-attr]
    await a.becomes(lambda: not mirrors._mirrors and not mirrors._endings)
    assert (await servers.states())["same"] == 0
    assert await cancel(b, "two")
    (answer,) = await stepped([second], b)
    assert answer.images


async def died(wire: Wire) -> None:
    """As far as the others see, the server is gone."""
    fleet = wire.server._fleet
    assert fleet is not None
    for task in (*fleet.member._tasks, *fleet.member._mirrors._tasks.values()):
        task.cancel()
    await fleet.member._peers.close()
    wire.server._entries._ledger._session.drop()  # type: ignore[attr-defined]


async def test_what_only_a_dead_server_wanted_does_not_run_on(servers: Servers) -> None:
    a, b = [await servers.start(each, dispatch=ONE) for each in "ab"]
    await submit(a, request_id="runs", steps=1000)
    await servers.becomes(lambda states: states == {"runs": 1})
    calls = [plain(a, steps=1000)]
    running = await only(servers, "runs")
    job = await b.submitted.get()
    await b.subscribers(running, 1)
    b.server.results.find(ANONYMOUS.name, running).reattach_grace = 0.05
    calls.append(plain(a, steps=1000))
    waiting = await only(servers, "runs", running)
    await died(a)
    assert await b.cancelled.get() == job.id
    await servers.becomes(lambda states: states[waiting] == states[running] == 5)
    (row,) = await servers.sql("SELECT failure FROM jobs WHERE request_id = $1", waiting)
    assert "the server that had the call is gone" in row["failure"]
    # What asked for more than its answer is taken over.
    b.engine.advance()
    await servers.becomes(lambda states: states["runs"] == 1)
    assert (await b.submitted.get()).request_id == "runs"
    for call in calls:
        call.cancel()


async def test_while_the_database_is_away_each_server_serves_and_counts_alone() -> None:
    with cluster() as own:
        async with AsyncExitStack() as stack:
            servers = Servers(own.url, stack)
            a = await servers.start("a", dispatch=ONE, security=Security(max_jobs_per_address=2))
            own.kill()
            first = plain(a, steps=5)
            await a.becomes(lambda: a.server.dispatcher.running_jobs == 1)
            second = plain(a, steps=5)
            await a.becomes(lambda: a.server.dispatcher.queued_jobs == 1)
            error = await refusal(plain(a, steps=5))
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert all(answer.images for answer in await stepped([first, second], a))
            third = plain(a, steps=5)
            await a.becomes(lambda: a.server.dispatcher.running_jobs == 1)
            own.start()
            await a.health_becomes(SERVING, "darkroom.v1.Ledger")
            # It is counted in the ledger by now, and leaves it at its end.
            await servers.becomes(lambda states: list(states.values()) == [1])
            assert (await stepped([third], a))[0].images
            await servers.becomes(lambda states: states == {})
            await a.becomes(lambda: not a.server._entries._tasks)
            assert await servers.states() == {}
            assert not a.server.results._entries.get(ANONYMOUS.name)
