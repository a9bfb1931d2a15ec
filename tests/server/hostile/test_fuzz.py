"""Ten thousand inputs over the wire, and a thousand over HTTP; `make fuzz` sends more."""

from tests.server.hostile import http_fuzz
from tests.server.hostile.fuzz import fuzz, fuzzed
from tests.server.hostile.leaks import nothing_leaks


async def test_ten_thousand_inputs_get_an_allowed_status() -> None:
    async with fuzzed() as wire:
        await fuzz(wire, 500, seed=1)
        async with nothing_leaks():
            statuses = await fuzz(wire, 10_000, seed=7)
        assert statuses.total() == 10_000
        assert min(statuses["OK"], statuses["INVALID_ARGUMENT"]) > 100
        assert (await wire.generate()).images
        assert wire.server.dispatcher.counts.live == 0


async def test_a_thousand_inputs_over_http_get_an_allowed_status() -> None:
    async with http_fuzz.fuzzed() as there:
        await http_fuzz.fuzz(there, 100, seed=1)
        async with nothing_leaks():
            statuses = await http_fuzz.fuzz(there, 1000, seed=7)
        assert statuses.total() == 1000
        assert min(statuses["200"], statuses["400"]) > 50
        assert (await there.generate()).status_code == 200
        assert there.wire.server.dispatcher.counts.live == 0
