"""The arithmetic of the rivals and of the simulated loop, on cases worked out by hand."""

import pytest

from bench import policies
from bench.arrivals import Arrivals, Drawn
from bench.policies import seconds_per_step
from bench.simulation import Machine, simulate_batches, simulate_loop
from bench.workload import Request, mixed
from darkroom_server.core import order

MACHINE = Machine(passes={1: 1.0, 2: 1.5, 4: 2.5}, decode=0.5)


def request(index: int, steps: int, arrival: float = 0.0, guidance: float = 4.0) -> Request:
    return Request(index, "", steps, guidance, seed=index, arrival=arrival)


def latencies(drawn: list[Drawn]) -> dict[int, float]:
    return {each.index: each.latency for each in drawn}


def test_passes_cost_what_was_measured_and_lines_between() -> None:
    assert [MACHINE.pass_seconds(n) for n in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 2.5, 3.5]


def test_one_call_after_another_waits_for_those_before() -> None:
    arrivals = Arrivals([request(0, 4), request(1, 2, arrival=1.0), request(2, 1, arrival=20.0)])
    drawn = simulate_batches(arrivals, MACHINE, most=1)
    assert latencies(drawn) == {0: 4.5, 1: 4.5 + 2.5 - 1.0, 2: 1.5}


def test_a_batch_takes_equal_settings_only_and_the_oldest_first() -> None:
    requests = [
        request(0, 2),
        request(1, 2, guidance=7.5),
        request(2, 2, guidance=7.5),
        request(3, 2),
    ]
    drawn = simulate_batches(Arrivals(requests), MACHINE, most=8)
    assert latencies(drawn) == {0: 4.0, 3: 4.0, 1: 8.0, 2: 8.0}


def test_a_newcomer_joins_between_passes() -> None:
    arrivals = Arrivals([request(0, 3), request(1, 1, arrival=0.5)])
    drawn = simulate_loop(arrivals, MACHINE, policies.wide(8))
    # One pass alone, one together, a decode in between, one alone.
    assert latencies(drawn) == {1: 1.0 + 1.5 + 0.5 - 0.5, 0: 1.0 + 1.5 + 0.5 + 1.0 + 0.5}


def test_a_narrow_policy_runs_the_most_urgent_alone() -> None:
    arrivals = Arrivals([request(0, 3), request(1, 1)])
    drawn = simulate_loop(arrivals, MACHINE, policies.wide(1))
    assert latencies(drawn) == {1: 1.5, 0: 5.0}


@pytest.mark.parametrize("most", [1, 8])
def test_a_closed_loop_draws_everything_and_never_has_more_callers(most: int) -> None:
    requests = mixed(40, seed=0)
    drawn = simulate_batches(Arrivals(requests, callers=3), MACHINE, most)
    assert sorted(each.index for each in drawn) == list(range(40))
    for each in drawn:
        under_way = [d for d in drawn if d.arrival <= each.arrival < d.arrival + d.latency]
        assert len(under_way) <= 3


def test_capacity_is_that_of_one_call_after_another() -> None:
    requests = mixed(40, seed=0)
    drawn = simulate_batches(Arrivals(requests, callers=1), MACHINE, most=1)
    seconds = max(each.arrival + each.latency for each in drawn)
    assert MACHINE.capacity(requests) == pytest.approx(40 / seconds)


def test_patience_is_changed_for_a_while() -> None:
    usual = order.SECONDS_PER_STEP
    with seconds_per_step(7.0):
        key = order.OrderKey(id=("", 0), submitted_at=1.0, remaining_steps=2)
        assert key.goal == 15.0
    assert usual == order.SECONDS_PER_STEP
