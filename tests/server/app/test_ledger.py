"""A server with a ledger: what it promises across its own death, while the ledger is away, too.

A death is a copy of the ledger's file, taken while the first server still runs: the second server
finds what a killed one would have left.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2

from darkroom.v1 import generation_pb2
from darkroom_server import app
from darkroom_server.backends.fake_model import fake_image_model, fake_model
from darkroom_server.core.caller import ANONYMOUS
from darkroom_server.core.errors import Failure, Reason, StartupError
from darkroom_server.core.ledger import Key
from darkroom_server.dispatch import JobOutcome
from darkroom_server.ledger.sqlite import SqliteLedger
from darkroom_server.settings import Dispatch, Results, Security, Shutdown, Storage
from tests.server.ledger.copies import left_behind
from tests.server.rpc.test_idempotency import cancel
from tests.server.rpc.test_jobs import name, page, state_of
from tests.server.streams import assembled, kind, rest, submit, watch
from tests.server.telemetry.scrape import values
from tests.server.uploads.pictures import plain
from tests.server.wire import NOT_SERVING, SERVING, Wire, refusal, serving

LEDGER = "darkroom.v1.Ledger"


@asynccontextmanager
async def server(path: Path, **sections: Any) -> AsyncIterator[Wire]:
    """A server that gives its jobs no time to finish when it stops."""
    sections = {"shutdown": Shutdown(grace=0.0), **sections}
    async with serving(storage=Storage(ledger=f"sqlite:{path}"), **sections) as wire:
        yield wire


async def written(wire: Wire) -> None:
    """Wait until everything that happened is in the ledger."""
    await wire.becomes(lambda: not wire.server._entries._tasks)


def entries(path: Path) -> dict[str, int]:
    """The state of each job in a ledger that no server has."""
    db = sqlite3.connect(path)
    found = dict(db.execute("SELECT request_id, state FROM jobs").fetchall())
    db.close()
    return found


async def images(wire: Wire, request_id: str) -> dict[int, bytes]:
    """The images of a job by index; its engine takes the steps that it needs."""
    call = watch(wire, request_id)
    responses = asyncio.create_task(rest(call))
    while not responses.done():
        wire.engine.advance()
        await asyncio.sleep(0.001)
    return assembled([r.event.image for r in await responses if kind(r) == "image"])


async def test_accepted_jobs_run_again_from_their_seeds(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    room = Dispatch(max_resident_samples=2)
    async with server(path, dispatch=room) as wire:
        accepted = await submit(wire, request_id="runs", image_count=2)
        seeds = accepted.seeds
        await submit(wire, request_id="waits", seed=5, steps=40)
        kept = wire.stream(
            request_id="kept", steps=41, on_disconnect=generation_pb2.ON_DISCONNECT_KEEP
        )
        await kept.read()
        plain_call = wire.generating(request_id="plain", steps=1000)
        await wire.becomes(lambda: wire.server.dispatcher.counts.accepted == 4)
        wire.engine.advance(2)
        copy = left_behind(path)
        expected = await images(wire, "runs"), await images(wire, "waits")
        plain_call.cancel()
        kept.cancel()
    merge = [structlog.contextvars.merge_contextvars]
    with structlog.testing.capture_logs(processors=merge) as logs:
        await run_again(copy, room, expected, seeds)
    assert {line["request_id"] for line in logs if line["event"] == "request"} >= {"runs", "waits"}


async def run_again(
    path: Path, room: Dispatch, expected: tuple[dict[int, bytes], ...], seeds: Sequence[int]
) -> None:
    """Start a server with what the first one left in ``path``, and compare."""
    async with server(path, dispatch=room) as wire:
        assert name((await state_of(wire, "runs")).state) == "RUNNING"
        waits = await state_of(wire, "waits")
        assert name(waits.state) == "QUEUED"
        assert waits.queue_position == 0
        assert [g.request_id for g in (await page(wire)).generations] == ["kept", "waits", "runs"]
        # A call that asked for nothing more than its answer is not the ledger's.
        assert (await refusal(state_of(wire, "plain"))).code is grpc.StatusCode.NOT_FOUND
        assert (await images(wire, "runs"), await images(wire, "waits")) == expected
        joined = await submit(wire, request_id="runs", image_count=2)
        assert joined.joined
        assert joined.seeds == seeds
        await written(wire)
        reclaimed = await values(wire, "darkroom_jobs_reclaimed_total", "cause")
        assert reclaimed == {("server_died",): 1.0, ("queued",): 2.0}
        asked = await values(wire, "darkroom_ledger_seconds_count", "op")
        assert asked["mine",] >= 1
        assert asked["end",] >= 2


async def test_ended_jobs_keep_their_outcome_and_images_are_generated_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "jobs.db"
    async with server(path) as wire:
        await submit(wire, request_id="good", image_count=2)
        expected = await images(wire, "good")
        await submit(wire, request_id="bad")
        wire.engine.fail("bad", Failure(Reason.NON_FINITE, "not a number"))
        await wire.counted(JobOutcome.FAILED)
        await submit(wire, request_id="gone", steps=1000)
        assert await cancel(wire, "gone")
        await submit(wire, request_id="late", steps=1000, time_limit=0.05)
        await wire.counted(JobOutcome.EXPIRED)
        await written(wire)
        copy = left_behind(path)
    async with server(copy, fake={"auto": True}) as wire:
        found = {g.request_id: g for g in (await page(wire)).generations}
        assert {id: name(g.state) for id, g in found.items()} == {
            "good": "FINISHED",
            "bad": "FAILED",
            "gone": "CANCELLED",
            "late": "EXPIRED",
        }
        assert (found["good"].finished_images, found["good"].step) == (2, 8)
        assert (found["bad"].error_reason, found["bad"].error_message) == (
            "NON_FINITE",
            "not a number",
        )
        error = await refusal(rest(watch(wire, "late")))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not await cancel(wire, "good")
        assert wire.submitted.empty()
        # Two callers want it, and it runs once.
        twice = await asyncio.gather(rest(watch(wire, "good")), rest(watch(wire, "good")))
        for responses in twice:
            got = assembled([r.event.image for r in responses if kind(r) == "image"])
            assert got == expected
        assert (await wire.submitted.get()).request_id == "good"
        assert wire.submitted.empty()
        # One that ended without its images runs again.
        assert not (await submit(wire, request_id="bad")).joined


async def test_ids_quotas_and_cancels_hold_across_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    quota = Security(max_jobs_per_address=2)
    async with server(path, security=quota) as wire:
        await submit(wire, request_id="one", steps=1000)
        await submit(wire, request_id="two", steps=1000)
        copy = left_behind(path)
    async with server(copy, security=quota) as wire:
        error = await refusal(submit(wire, request_id="three"))
        assert error.info.reason == "QUOTA_EXCEEDED"
        error = await refusal(submit(wire, request_id="one", steps=999))
        assert error.info.reason == "REQUEST_CONFLICT"
        twins = await asyncio.gather(
            *(submit(wire, request_id="one", steps=1000) for _ in range(5))
        )
        assert all(accepted.joined for accepted in twins)
        assert await cancel(wire, "one")
        again = left_behind(copy, "again.db")
        assert not (await submit(wire, request_id="three", steps=1000)).joined
    assert entries(again) == {"one": 5, "two": 1}


async def test_new_ids_at_once_are_one_durable_job(tmp_path: Path) -> None:
    async with server(tmp_path / "jobs.db") as wire:
        twins = await asyncio.gather(*(submit(wire, request_id="twin") for _ in range(10)))
        assert [accepted.joined for accepted in twins].count(False) == 1
        assert len({accepted.seeds[0] for accepted in twins}) == 1
        assert wire.server.dispatcher.counts.accepted == 1
        assert entries(left_behind(tmp_path / "jobs.db")) == {"twin": 1}


async def test_a_server_that_stops_gives_its_jobs_back(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with server(path) as wire:
        await submit(wire, request_id="runs", steps=1000)
        call = watch(wire, "runs")
        await call.read()
        following = asyncio.create_task(refusal(rest(call)))
    error = await following
    assert (error.code, error.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    db = sqlite3.connect(path)
    assert db.execute("SELECT state, losses FROM jobs").fetchall() == [(0, 0)]
    db.close()


@pytest.mark.parametrize(("losses", "state"), [(1, "RUNNING"), (2, "QUEUED"), (3, "FAILED")])
async def test_a_job_that_servers_die_with_is_isolated_and_then_failed(
    losses: int, state: str, tmp_path: Path
) -> None:
    path = tmp_path / "jobs.db"
    async with server(path) as wire:
        await submit(wire, request_id="other", steps=1000)
        await submit(wire, request_id="poison", steps=1000)
        copy = left_behind(path)
    db = sqlite3.connect(copy)
    db.execute("UPDATE jobs SET losses = ? WHERE request_id = 'poison'", (losses - 1,))
    db.commit()
    db.close()
    async with server(copy) as wire:
        assert name((await state_of(wire, "other")).state) == "RUNNING"
        poison = await state_of(wire, "poison")
        assert name(poison.state) == state
        if losses == 3:
            assert poison.error_reason == "ENGINE_CRASHED"
            assert "3 servers died" in poison.error_message


async def test_while_the_ledger_is_away_what_runs_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs.db"
    quick = SqliteLedger(path, retention=300.0, busy_seconds=0.01)
    monkeypatch.setattr(app, "chosen_ledger", lambda *_, **__: quick)
    async with server(path) as wire:
        await submit(wire, request_id="runs")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        error = await refusal(submit(wire, request_id="new"))
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.info.reason == "LEDGER_UNREACHABLE"
        retry = error.detail(error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToMilliseconds() == 1000
        assert await wire.health(LEDGER) == NOT_SERVING
        assert await wire.health() == SERVING
        assert (await values(wire, "darkroom_ledger_reachable"))[()] == 0
        # The job that could not be accepted is not known, and does not run.
        assert (await refusal(state_of(wire, "new"))).code is grpc.StatusCode.NOT_FOUND
        assert await images(wire, "runs")
        plain_call = wire.generating()
        await wire.becomes(lambda: wire.server.dispatcher.running_jobs == 1)
        wire.engine.advance(4)
        assert (await plain_call).images
        other.execute("ROLLBACK")
        other.close()
        await wire.health_becomes(SERVING, LEDGER)
        await written(wire)
        assert entries(left_behind(path)) == {"runs": 2}
        assert not (await submit(wire, request_id="new", steps=1000)).joined


async def test_jobs_of_a_model_that_is_gone_fail(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with server(path, fake={"models": [fake_model("demo")]}) as wire:
        await submit(wire, request_id="mine", steps=1000)
        copy = left_behind(path)
    db = sqlite3.connect(copy)
    db.execute("UPDATE jobs SET model = 'old'")
    db.commit()
    db.close()
    async with server(copy) as wire:
        error = await refusal(rest(watch(wire, "mine")))
        assert (error.code, error.info.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_GONE",
        )
        assert wire.submitted.empty()
    assert entries(copy) == {"mine": 3}


async def test_an_exact_job_that_began_runs_only_with_the_runtime_of_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "jobs.db"
    async with server(path) as wire:
        await submit(wire, request_id="exact", exact=True, steps=1000)
        await submit(wire, request_id="usual", steps=4)
        copy, same = left_behind(path), left_behind(path, "same.db")
    half = fake_model().with_runtime(dtype="bfloat16")
    async with server(copy, fake={"models": [half]}) as wire:
        error = await refusal(rest(watch(wire, "exact")))
        assert (error.code, error.info.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_GONE",
        )
        assert "dtype" in error.message
        assert (await wire.submitted.get()).request_id == "usual"
        assert wire.submitted.empty()
    assert entries(copy) == {"exact": 3, "usual": 0}  # Released, as its server stopped.
    async with server(same) as wire:
        jobs = {(await wire.submitted.get()).request_id for _ in range(2)}
        assert jobs == {"exact", "usual"}


async def test_until_the_models_are_loaded_a_job_is_neither_lost_nor_found(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with server(path) as wire:
        await submit(wire, request_id="mine")
        copy = left_behind(path)
    async with server(copy, wait=False, fake={"load": False}) as wire:
        for call in (rest(watch(wire, "mine")), state_of(wire, "mine"), page(wire)):
            error = await refusal(call)
            assert (error.code, error.info.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "MODEL_LOADING",
            )
        assert (await refusal(state_of(wire, "other"))).code is grpc.StatusCode.NOT_FOUND
        wire.engine.become_ready()
        await wire.health_becomes(SERVING)
        assert await images(wire, "mine")


async def test_inputs_are_kept_as_long_as_their_job_may_run(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    picture: dict[str, Any] = {"image": {"data": plain()}, "strength": 0.5}
    options: dict[str, Any] = {
        "fake": {"models": [fake_image_model()]},
        "dispatch": Dispatch(max_resident_samples=1),
    }
    async with server(path, **options) as wire:
        await submit(wire, request_id="first", seed=1, **picture)
        await submit(wire, request_id="second", seed=2, **picture)
        copy = left_behind(path)
        expected = await images(wire, "first")
    async with server(copy, **options) as wire:
        job = await wire.submitted.get()
        assert job.image is not None
        assert len(job.image.pixels) == job.width * job.height * 3
        assert await images(wire, "first") == expected
        assert await cancel(wire, "second")
        key = Key(ANONYMOUS.name, "first")
        assert list((await wire.server._entries.inputs(key)).values()) == [plain()]
        wire.server.results._remove(key)
        await written(wire)
        left = left_behind(copy, "left.db")
    db = sqlite3.connect(left)
    assert db.execute("SELECT count(*) FROM inputs").fetchone() == (0,)
    db.close()


async def test_a_kept_job_ends_if_its_caller_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with server(path) as wire:
        call = wire.stream(
            request_id="kept", steps=1000, on_disconnect=generation_pb2.ON_DISCONNECT_KEEP
        )
        await call.read()
        copy = left_behind(path)
        call.cancel()
    async with server(copy, results=Results(reattach_grace=0.05)) as wire:
        await wire.counted(JobOutcome.CANCELLED)


async def test_a_deadline_may_pass_while_no_server_runs(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with server(path) as wire:
        await submit(wire, request_id="late", steps=1000, time_limit=60.0)
        await submit(wire, request_id="early", steps=1000, time_limit=60.0)
        copy = left_behind(path)
    db = sqlite3.connect(copy)
    db.execute("UPDATE jobs SET deadline = accepted_at WHERE request_id = 'late'")
    db.commit()
    db.close()
    async with server(copy) as wire:
        error = await refusal(rest(watch(wire, "late")))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert name((await state_of(wire, "early")).state) == "RUNNING"
        await written(wire)
        assert entries(left_behind(copy, "again.db")) == {"late": 4, "early": 1}


async def test_a_second_server_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with server(path):
        with pytest.raises(StartupError, match="another server has the ledger"):
            async with server(path):
                pass
