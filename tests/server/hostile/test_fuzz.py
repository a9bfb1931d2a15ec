"""Ten thousand inputs over the wire; `make fuzz` sends a hundred thousand."""

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
