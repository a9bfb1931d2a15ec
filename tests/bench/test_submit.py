import argparse
from dataclasses import replace
from typing import Any

import pytest

from bench.micro.submit import BENCHMARK, ENGINES, LOADS, Load, goals, measure, submit_ms
from tests.bench.test_results import RESULTS


def figures(ms: float) -> dict[str, Any]:
    return {load: {str(engines): [ms] * 3 for engines in ENGINES} for load in LOADS}


def test_every_load_is_measured_with_every_number_of_engines() -> None:
    found = measure(argparse.Namespace(rounds=2, submits=2)).figures
    assert found.keys() == LOADS.keys()
    for by_engines in found.values():
        assert by_engines.keys() == {"1", "8"}
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in by_engines.values())


async def test_a_load_that_cannot_be_held_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="0 jobs wait, and not 1"):
        await submit_ms(1, Load(running=1, waiting=1), submits=1)


@pytest.mark.parametrize(("ms", "met"), [(0.4, True), (0.6, False)])
def test_the_goal_is_for_submits_that_find_room(ms: float, met: bool) -> None:
    settings = {"rounds": 3, "submits": 10, "places": 8}
    results = replace(RESULTS, figures=figures(ms), settings=settings)
    found = goals(results)
    assert [goal.met for goal in found] == [met] * 3
    assert not any("wait" in goal.name for goal in found)
    text = BENCHMARK.section(results)
    assert f"| full, and 32 jobs wait | {ms:.2f}" in text
    assert ("**no**" in text) is not met
