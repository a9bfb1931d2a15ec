"""Whatever is asked of them in whatever order, all ledgers answer the same."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom_server.core.errors import DarkroomError
from darkroom_server.core.ledger import Hold, Key, Ledger, Models, Standing
from darkroom_server.ledger.input_limits import InputLimits
from darkroom_server.ledger.memory import MemoryLedger
from darkroom_server.ledger.postgres import PostgresLedger
from darkroom_server.ledger.sqlite import SqliteLedger
from tests.server.ledger.conftest import draft
from tools.postgres import Cluster, emptied

NAMES = ("a", "b", "c")
IDS = st.sampled_from(NAMES)
HOLDS = st.tuples(IDS, st.integers(1, 4))
INPUTS = st.dictionaries(st.sampled_from(["x", "y"]), st.just(b"12345"), max_size=2)
CALLERS = st.sampled_from(["ada", "bob"])
NEEDS = st.frozensets(st.sampled_from(["lora", "inpaint"]))
OPERATIONS = st.one_of(
    st.tuples(
        st.just("begin"),
        IDS,
        st.sampled_from([b"1", b"2"]),
        INPUTS,
        st.booleans(),
        NEEDS,
        st.sampled_from([None, 0.0, 600.0]),
        CALLERS,
    ),
    st.tuples(st.just("claim"), st.integers(0, 2), st.none() | NEEDS),
    st.tuples(st.just("end"), HOLDS, st.sampled_from([s for s in Standing if s.ended])),
    st.tuples(st.just("release"), HOLDS),
    st.tuples(st.just("cancel"), IDS),
    st.tuples(st.just("again"), IDS),
    st.tuples(st.just("forget"), HOLDS),
)


@pytest.mark.needs("postgresql")
@settings(max_examples=20)
@given(operations=st.lists(OPERATIONS, max_size=15))
def test_all_ledgers_answer_the_same(postgresql: Cluster, operations: list[Any]) -> None:
    async def compare() -> None:
        with tempfile.TemporaryDirectory() as folder:
            limits = InputLimits(together=12, of_caller=8)
            options: dict[str, Any] = {"retention": 300.0, "inputs": limits}
            ledgers: list[Ledger] = [
                MemoryLedger(**options),
                SqliteLedger(Path(folder) / "jobs.db", **options),
                PostgresLedger(postgresql.url, **options),
            ]
            await emptied(postgresql.url)
            for ledger in ledgers:
                await ledger.open()
            for operation in operations:
                answers = [await answer(ledger, *operation) for ledger in ledgers]
                assert answers == [answers[0]] * 3, operation
                states = [await state(ledger) for ledger in ledgers]
                assert states == [states[0]] * 3, operation
            for ledger in ledgers:
                await ledger.close()

    asyncio.run(compare())


async def answer(ledger: Ledger, op: str, *values: Any) -> Any:
    try:
        match op, values:
            case "begin", (id, fingerprint, inputs, claimed, needs, deadline, caller):
                asked = draft(
                    id,
                    fingerprint=fingerprint,
                    inputs=inputs,
                    max_live=2,
                    needs=needs,
                    deadline=deadline,
                    counted_as=caller,
                )
                return (await ledger.begin(asked, claimed=claimed)).new
            case "claim", (room, offers):
                models = Models(held={"demo": "fast"}, offers=offers)
                return [entry.key for entry in await ledger.claim(room, models=models)]
            case "end", (named, standing):
                return await ledger.end(hold(*named), standing)
            case "release", (named,):
                return await ledger.release([hold(*named)])
            case "forget", (named,):
                return await ledger.forget([hold(*named)])
            case "again", (id,):
                again = await ledger.again(Key("ada", id), "fast")
                return again and (again.standing, again.epoch)
            case _, (id,):
                entry = await getattr(ledger, op)(Key("ada", id))
                return entry and (entry.standing, entry.epoch)
    except DarkroomError as error:
        return type(error)


def hold(id: str, epoch: int) -> Hold:
    return Hold(Key("ada", id), epoch)


async def state(ledger: Ledger) -> list[Any]:
    entries = [await ledger.find(Key("ada", id)) for id in NAMES]
    return [
        e
        and (e.key, e.standing, e.epoch, e.fingerprint, e.needs, sorted(await ledger.inputs(e.key)))
        for e in entries
    ]
