"""Servers that share a ledger: any of them answers for any job."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.ledger import Entry
from darkroom_server.dispatch import JobOutcome
from darkroom_server.settings import Dispatch, Results, Security
from tests.server.fleet.conftest import HeldAnswers, Servers
from tests.server.http.door import token_file
from tests.server.rpc.test_idempotency import cancel
from tests.server.rpc.test_jobs import name, page, state_of
from tests.server.streams import assembled, kind, rest, submit, until, watch
from tests.server.telemetry.scrape import values
from tests.server.wire import NOT_SERVING, SERVING, Wire, refusal
from tools.postgres import cluster

pytestmark = pytest.mark.needs("postgresql")

LEDGER = "darkroom.v1.Ledger"
ONE = Dispatch(max_resident_samples=1)


async def images(wire: Wire, request_id: str, *engines: Wire) -> dict[int, bytes]:
    """The images of a job by index, asked at ``wire`` while ``engines`` take steps."""
    responses = asyncio.create_task(rest(watch(wire, request_id)))
    while not responses.done():
        for each in engines:
            each.engine.advance()
        await asyncio.sleep(0.001)
    return assembled([r.event.image for r in await responses if kind(r) == "image"])


async def test_any_server_answers_for_any_job(servers: Servers) -> None:
    a, b = await servers.start("a"), await servers.start("b")
    accepted = await submit(a, request_id="job", image_count=2, steps=3)
    call = watch(b, "job")
    first = await call.read()
    assert first.event.accepted.seeds == accepted.seeds
    assert first.event.accepted.joined
    await a.subscribers("job", 1)
    a.engine.advance()
    assert (await until(call, "progress")).steps == 3
    running = await state_of(b, "job")
    assert (name(running.state), running.steps) == ("RUNNING", 6)
    a.engine.advance(2)
    responses = await rest(call)
    assert kind(responses[-1]) == "finished"
    got = assembled([r.event.image for r in responses if kind(r) == "image"])
    assert got == await images(a, "job")
    # The record of an image says what the server did that made it.
    (mine,) = [r.event.image.image for r in await rest(watch(a, "job")) if kind(r) == "image"][:1]
    (relayed,) = [r.event.image.image for r in responses if kind(r) == "image"][:1]
    assert mine == relayed
    assert b.submitted.empty()
    assert name((await state_of(b, "job")).state) == "FINISHED"
    assert (await refusal(state_of(b, "other"))).code is grpc.StatusCode.NOT_FOUND
    assert (await refusal(rest(watch(b, "other")))).code is grpc.StatusCode.NOT_FOUND
    relayed_calls = await values(b, "darkroom_relayed_calls_total", "method")
    assert relayed_calls.pop(("GetGeneration",)) >= 1.0  # Until its end is in the ledger.
    assert relayed_calls == {
        ("WatchGeneration",): 1.0,
        ("CancelGeneration",): 0.0,
        ("ListGenerations",): 0.0,
    }


async def test_a_list_has_the_jobs_of_all_servers(servers: Servers) -> None:
    a, b = await servers.start("a"), await servers.start("b")
    await submit(a, request_id="one", steps=5)
    await submit(b, request_id="two", steps=5, image_count=2)
    plain = a.generating(request_id="plain", steps=5)
    await a.becomes(lambda: a.server.dispatcher.running_jobs == 2)
    await servers.becomes(lambda states: states == {"one": 1, "two": 1})
    b.engine.advance(2)
    listed: dict[str, Any] = {}
    while not listed or listed["two"].step < 4:
        listed = {job.request_id: job for job in (await page(a)).generations}
    assert list(listed) == ["plain", "two", "one"]
    two = listed["two"]
    assert (name(two.state), two.step, two.steps, two.image_count) == ("RUNNING", 4, 10, 2)
    # What is not in the ledger is listed by the server that has it.
    assert [job.request_id for job in (await page(b)).generations] == ["two", "one"]
    seen, token = [], ""
    for wire in (a, b, a):
        response = await page(wire, 1, token)
        seen += [job.request_id for job in response.generations]
        token = response.next_page_token
    assert (seen, token) == (["plain", "two", "one"], "")
    assert (await values(a, "darkroom_relayed_calls_total", "method"))[("ListGenerations",)] >= 2
    b.engine.advance(3)
    a.engine.advance(5)
    await plain
    await servers.becomes(lambda states: set(states.values()) == {2})
    ended = {job.request_id: job for job in (await page(a)).generations}
    assert {name(job.state) for job in ended.values()} == {"FINISHED"}
    assert (ended["two"].finished_images, ended["two"].step) == (2, 10)


async def test_one_id_at_three_servers_at_once_is_one_job(servers: Servers) -> None:
    fleet = [await servers.start(each, fake={"pass_seconds": 0.02}) for each in "abc"]
    # Long jobs: a server begins one before it knows that another has it, and must not finish it.
    for number in range(5):
        id = f"same{number}"
        calls = [
            each.generate(steps=50, request_id=id, on_disconnect=generation_pb2.ON_DISCONNECT_KEEP)
            for each in fleet
        ]
        answers = await asyncio.gather(*calls)
        assert len({answer.images[0].seed for answer in answers}) == 1
        assert len({answer.images[0].data for answer in answers}) == 1
        error = await refusal(
            fleet[2].generate(
                "another prompt", request_id=id, on_disconnect=generation_pb2.ON_DISCONNECT_KEEP
            )
        )
        assert error.info.reason == "REQUEST_CONFLICT"
    finished = [each.server.dispatcher.counts.by_end[JobOutcome.FINISHED] for each in fleet]
    assert sum(finished) == 5
    await servers.becomes(lambda states: set(states.values()) == {2})


async def test_a_job_is_cancelled_through_another_server(servers: Servers) -> None:
    a, b = await servers.start("a"), await servers.start("b")
    await submit(a, request_id="runs", steps=1000)
    following = asyncio.create_task(refusal(rest(watch(a, "runs"))))
    elsewhere = asyncio.create_task(refusal(rest(watch(b, "runs"))))
    await a.subscribers("runs", 2)
    assert await cancel(b, "runs")
    for error in (await following, await elsewhere):
        assert (error.code, error.info.reason) == (grpc.StatusCode.CANCELLED, "CANCELLED")
    assert not await cancel(b, "runs")
    assert (await refusal(cancel(b, "other"))).code is grpc.StatusCode.NOT_FOUND
    assert (await servers.states())["runs"] == 5


async def test_what_finds_no_room_runs_wherever_room_comes_first(servers: Servers) -> None:
    a, b = await servers.start("a", dispatch=ONE), await servers.start("b", dispatch=ONE)
    await submit(a, request_id="first", steps=5)
    await servers.becomes(lambda states: states == {"first": 1})
    await submit(a, request_id="second", steps=5)
    job = await b.submitted.get()  # It was accepted by the other server.
    assert job.request_id == "second"
    late = a.stream(request_id="third", steps=5, on_disconnect=generation_pb2.ON_DISCONNECT_KEEP)
    assert (await until(late, "accepted")).seeds
    assert (await servers.states())["third"] == 0
    assert name((await state_of(b, "third")).state) == "QUEUED"
    b.engine.advance(5)
    assert (await b.submitted.get()).request_id == "third"
    b.engine.advance(5)
    responses = await rest(late)
    assert kind(responses[-1]) == "finished"
    assert await images(a, "second", b)
    assert await images(b, "first", a)


async def test_a_job_that_is_claimed_and_not_taken_up_yet_is_not_unknown(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await servers.start("a"), await servers.start("b", dispatch=ONE)
    taken_up = asyncio.Event()
    take_up_one = a.server._durability.take_up_one

    async def later(entry: Entry) -> None:
        await taken_up.wait()
        await take_up_one(entry)

    monkeypatch.setattr(a.server._durability, "take_up_one", later)
    await submit(b, request_id="runs", steps=1000)
    await submit(b, request_id="moves", steps=5)
    await servers.becomes(lambda states: states == {"runs": 1, "moves": 1})
    watching = asyncio.create_task(rest(watch(b, "moves")))
    for wire in (a, b):
        for call in (state_of(wire, "moves"), cancel(wire, "moves")):
            error = await refusal(call)
            assert (error.code, error.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    taken_up.set()
    assert (await a.submitted.get()).request_id == "moves"
    assert name((await state_of(b, "moves")).state) == "RUNNING"
    a.engine.advance(5)
    assert kind((await watching)[-1]) == "finished"


async def test_no_more_jobs_are_accepted_for_an_engine_than_it_has_places(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await servers.start("a", dispatch=Dispatch(max_resident_samples=5))
    held = HeldAnswers(a, monkeypatch)
    calls = [asyncio.create_task(submit(a, request_id=f"job{n}", steps=1000)) for n in range(40)]
    # Every begin is in the ledger, and no server knows that yet.
    await servers.becomes(lambda states: len(states) == 40)
    assert sorted((await servers.states()).values()) == [0] * 35 + [1] * 5
    assert len(a.engine.jobs) == a.submitted.qsize() == 5
    held.release.set()
    assert not any(accepted.joined for accepted in await asyncio.gather(*calls))
    assert len(a.engine.jobs) == 5


async def test_a_queued_job_is_cancelled_by_any_server_and_by_a_caller_that_leaves(
    servers: Servers,
) -> None:
    results = Results(reattach_grace=0.05)
    a = await servers.start("a", dispatch=ONE, results=results)
    b = await servers.start("b", dispatch=ONE)
    await submit(a, request_id="one", steps=1000)
    await submit(b, request_id="two", steps=1000)
    await submit(a, request_id="waits", steps=1000)
    assert await cancel(b, "waits")
    kept = a.stream(request_id="kept", on_disconnect=generation_pb2.ON_DISCONNECT_KEEP)
    await until(kept, "accepted")
    kept.cancel()
    await servers.becomes(lambda states: states["kept"] == 5)
    assert await servers.states() == {"one": 1, "two": 1, "waits": 5, "kept": 5}


async def test_a_quota_holds_for_the_whole_fleet(servers: Servers) -> None:
    quota = Security(max_jobs_per_address=5)
    fleet = [await servers.start(each, security=quota, dispatch=ONE) for each in "abc"]
    calls = [submit(fleet[n % 3], request_id=f"job{n}", steps=1000) for n in range(50)]
    done = await asyncio.gather(*calls, return_exceptions=True)
    refused = [each for each in done if isinstance(each, grpc.aio.AioRpcError)]
    assert len(done) - len(refused) == 5
    assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert len(await servers.states()) == 5


async def test_a_call_that_asks_for_no_more_than_its_answer_stays_off_the_ledger(
    servers: Servers,
) -> None:
    a = await servers.start("a", fake={"auto": True})
    assert (await a.generate()).images
    assert (await a.generate(request_id="named")).images
    assert await servers.states() == {}


async def test_a_server_that_stops_leaves_its_jobs_to_the_others(servers: Servers) -> None:
    a = await servers.start("a", fake={"auto": True}, dispatch=ONE)
    b = await servers.start("b")
    expected = await b_images(a)
    await submit(b, request_id="job", seed=7, steps=5)
    there, elsewhere = watch(b, "job"), watch(a, "job")
    await b.subscribers("job", 2)
    b.engine.advance(2)
    await until(there, "started")
    await until(elsewhere, "progress")
    following = asyncio.create_task(refusal(rest(there)))
    b.server.stop()
    stopping = asyncio.create_task(b.server.shutdown())
    error = await following
    assert (error.code, error.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    responses = await rest(elsewhere)
    assert kind(responses[-1]) == "finished"
    assert "restarted" in map(kind, responses)
    assert assembled([r.event.image for r in responses if kind(r) == "image"]) == expected
    assert (await servers.sql("SELECT losses FROM jobs WHERE request_id = 'job'"))[0][0] == 0
    await stopping


async def test_an_interrupted_exact_job_waits_for_a_server_of_its_own_kind(
    servers: Servers,
) -> None:
    half = fake_model().with_runtime(dtype="bfloat16")
    a, b = await servers.start("a"), await servers.start("b", fake={"models": [half]})
    await submit(a, request_id="exact", seed=7, exact=True, steps=5)
    await submit(a, request_id="usual", steps=5)
    await servers.becomes(lambda states: states == {"exact": 1, "usual": 1})
    a.server.stop()
    await a.server.shutdown()
    assert (await b.submitted.get()).request_id == "usual"
    b.engine.advance(5)
    await servers.becomes(lambda states: states == {"exact": 0, "usual": 2})
    assert name((await state_of(b, "exact")).state) == "QUEUED"
    c = await servers.start("c")
    assert (await c.submitted.get()).request_id == "exact"
    assert b.submitted.empty()
    assert await images(b, "exact", c)


async def b_images(wire: Wire) -> dict[int, bytes]:
    await submit(wire, request_id="same", seed=7, steps=5)
    return await images(wire, "same")


async def test_images_that_are_gone_with_their_server_are_generated_again(
    servers: Servers,
) -> None:
    a = await servers.start("a")
    b = await servers.start("b", fake={"auto": True})
    await submit(b, request_id="job", seed=3)
    expected = await images(b, "job")
    await servers.becomes(lambda states: states["job"] == 2)
    b.server.stop()
    await b.server.shutdown()
    assert [row["name"] for row in await servers.sql("SELECT name FROM servers")] == ["a"]
    assert await images(a, "job", a) == expected


async def test_how_a_job_ended_is_known_everywhere(servers: Servers) -> None:
    a, b = await servers.start("a"), await servers.start("b")
    await submit(a, request_id="bad")
    call = watch(b, "bad")
    await call.read()
    a.engine.fail("bad", Failure(Reason.NON_FINITE, "not a number"))
    for error in (await refusal(rest(call)), await refusal(rest(watch(b, "bad")))):
        assert (error.code, error.info.reason) == (grpc.StatusCode.INTERNAL, "NON_FINITE")
        assert error.message == "not a number"
    await servers.becomes(lambda states: states["bad"] == 3)
    failed = await state_of(b, "bad")
    assert (name(failed.state), failed.error_reason) == ("FAILED", "NON_FINITE")
    # It runs again, wherever it is asked for.
    accepted = await submit(b, request_id="bad")
    assert not accepted.joined
    assert (await b.submitted.get()).request_id == "bad"


async def test_a_caller_sees_only_its_own_jobs_on_every_server(
    servers: Servers, tmp_path: Path
) -> None:
    security = Security(tokens=token_file(tmp_path, "alice", "bob"))
    a = await servers.start("a", security=security)
    b = await servers.start("b", security=security)
    alice, bob = ((("authorization", f"Bearer {who}-secret"),) for who in ("alice", "bob"))
    request = generation_pb2.SubmitGenerationRequest(
        generation=generation_pb2.GenerateRequest(prompt="a star", request_id="job", steps=1000)
    )
    await a.generation.SubmitGeneration(request, metadata=alice)
    asked = generation_pb2.GetGenerationRequest(request_id="job")
    found = await b.generation.GetGeneration(asked, metadata=alice)
    assert name(found.generation.state) == "RUNNING"
    error = await refusal(b.generation.GetGeneration(asked, metadata=bob))
    assert error.code is grpc.StatusCode.NOT_FOUND
    (row,) = await servers.sql("SELECT key FROM servers WHERE name = 'a'")
    for token in (f"fleet.{row['key']}x.YWxpY2U=", "fleet.", "fleet.x"):
        error = await refusal(
            a.generation.GetGeneration(asked, metadata=(("authorization", f"Bearer {token}"),))
        )
        assert error.code is grpc.StatusCode.UNAUTHENTICATED
    assert (
        await b.generation.CancelGeneration(
            generation_pb2.CancelGenerationRequest(request_id="job"), metadata=alice
        )
    ).cancelled


async def test_while_the_database_is_away_what_runs_goes_on(tmp_path: Path) -> None:
    from contextlib import AsyncExitStack

    with cluster() as own:
        async with AsyncExitStack() as stack:
            servers = Servers(own.url, stack)
            a, b = await servers.start("a"), await servers.start("b")
            await submit(a, request_id="runs", steps=5)
            elsewhere = watch(b, "runs")
            await elsewhere.read()
            await a.subscribers("runs", 1)
            own.kill()
            error = await refusal(submit(a, request_id="new"))
            assert error.code is grpc.StatusCode.UNAVAILABLE
            assert error.info.reason == "LEDGER_UNREACHABLE"
            assert await a.health() == SERVING
            assert await a.health(LEDGER) == NOT_SERVING
            got = await images(a, "runs", a)
            relayed = await rest(elsewhere)
            assert assembled([r.event.image for r in relayed if kind(r) == "image"]) == got
            plain: Any = a.generating()
            await a.becomes(lambda: a.server.dispatcher.running_jobs == 1)
            a.engine.advance(4)
            assert (await plain).images
            own.start()
            await a.health_becomes(SERVING, LEDGER)
            await b.health_becomes(SERVING, LEDGER)
            await servers.becomes(lambda states: states == {"runs": 2})
            assert not (await submit(a, request_id="new", steps=1000)).joined
