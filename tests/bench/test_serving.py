"""The sections of the benchmarks of serving, from handwritten results."""

from dataclasses import replace
from typing import Any

import pytest

from bench.serving import (
    estimates,
    fleet_cancels,
    fleet_cost,
    http_door,
    ledger_cost,
    overload,
)
from bench.serving.estimates import Pair
from bench.serving.fleet_simulation import FleetSimulation, Plan
from bench.serving.overload import Call, in_time
from tests.bench.test_results import RESULTS


def test_the_estimates_section() -> None:
    pairs = [Pair(8, 1.0, 1.0), Pair(16, 1.1, 1.0), Pair(40, 1.0, 2.0)]
    figures = {"capacity": 4.0, "pairs": {"0.7": [list(pair) for pair in pairs]}}
    settings = {"arrivals": 3, "closed": 9, "callers": 8, "seed": 0}
    results = replace(RESULTS, figures=figures, settings=settings)
    assert (
        "| 0.7 of the capacity | 10% | 0% | 10% | 50% | 42% | 1.00 |"
        in estimates.BENCHMARK.section(results)
    )
    (goal,) = estimates.goals(results)
    assert goal.reached == pytest.approx(0.1)
    assert goal.met


def server(calls: list[Call]) -> dict[str, Any]:
    return {
        "rate": 20.0,
        "images_per_second": 4.0,
        "steps_per_second": 64.0,
        "memory_before": 2**30,
        "memory_peak": 2**31,
        "memory_after": 2**30,
        "calls": [list(call) for call in calls],
    }


ANSWERED = [Call(16, i / 4, 5.0, "image", 0.1) for i in range(38)]
REJECTED = [Call(40, i / 4, 5.0, "DEADLINE_UNREACHABLE", 0.01) for i in range(38)]


def overloaded(ours: list[Call], theirs: list[Call]) -> Any:
    settings = {"callers": 200, "factor": 5.0, "seconds": 10.0, "patience": [4.0, 20.0]}
    figures = {"darkroom": server(ours), "first come": server(theirs)}
    return replace(RESULTS, figures=figures, settings=settings)


def test_the_overload_section() -> None:
    expired = [Call(16, 0.0, 5.0, "expired", 5.0)] * 57
    results = overloaded(ANSWERED + REJECTED, ANSWERED[:19] + expired)
    page = overload.BENCHMARK.section(results)
    assert "| images in time, per second | 3.80 | 1.90 |" in page
    assert "| … of the capacity | 95% | 48% |" in page
    assert "| rejected | 50% | 0% |" in page
    assert "| expired | 0% | 75% |" in page
    assert "| memory before / peak / after, MiB | 1024 / 2048 / 1024 | 1024 / 2048" in page
    assert "`DEADLINE_UNREACHABLE` 38" in page
    assert all(goal.met for goal in overload.goals(results))


def test_a_malformed_answer_misses_the_goals() -> None:
    odd = Call(8, 1.0, 5.0, "malformed: UNKNOWN", 0.1)
    goals = {g.name: g for g in overload.goals(overloaded([odd], [odd]))}
    assert not goals["malformed answers"].met
    assert not goals["goodput over the capacity"].met
    assert not odd.rejected


def test_a_late_image_does_not_count() -> None:
    late = Call(8, 1.0, 0.5, "image", 0.6)
    after = Call(8, 9.9, 5.0, "image", 0.6)
    assert in_time([late, after, *ANSWERED], seconds=10.0) == ANSWERED


def doors(over_http: list[float], beside: list[float]) -> Any:
    settings = {"pairs": 20, "rounds": 20, "images": 150, "streams": 200, "callers": 16}
    settings |= {"steps": 8, "lone_steps": 20}
    figures = {
        "lone": {"grpc": [0.5] * 20, "http": over_http},
        "closed": {"without": [20.0] * 20, "with": beside},
    }
    return replace(RESULTS, figures=figures, settings=settings)


def test_the_http_section() -> None:
    results = doors([0.505] * 20, [19.9] * 20)
    page = http_door.BENCHMARK.section(results)
    assert "| lone request, ms | 500.0 | 505.0 |" in page
    assert "| closed loop, images/s | 20.00 | 19.90 |" in page
    lone, closed = http_door.goals(results)
    assert (lone.reached, closed.reached) == pytest.approx((1.01, 0.995))
    assert lone.met
    assert closed.met


def test_the_worse_end_of_the_interval_decides() -> None:
    results = doors([0.505] * 11 + [0.6] * 9, [19.9] * 11 + [18.0] * 9)
    lone, closed = http_door.goals(results)
    assert (lone.reached, closed.reached) == pytest.approx((1.01, 0.995))
    assert not lone.met
    assert not closed.met


def ledger_results(memory: float) -> Any:
    rounds = 30
    submit = {"without": [4e-4] * rounds, "memory": [5e-4] * rounds, "sqlite": [2e-3] * rounds}
    return replace(
        RESULTS,
        figures={
            "generate": {"without": [1e-3] * rounds, "memory": [memory] * rounds},
            "submit": submit,
            "submit_at_once": submit,
        },
        settings={"rounds": rounds, "calls": 200, "callers": 8, "before": "abc"},
    )


def test_the_ledger_section() -> None:
    text = ledger_cost.BENCHMARK.section(ledger_results(1.01e-3))
    assert "| lone `Generate` | 1000 | 1010 (1.01 to 1.01 ×) | – |" in text
    assert "| 400 | 500 (1.25 to 1.25 ×) | 2000 (5.00 to 5.00 ×) |" in text


@pytest.mark.parametrize(("memory", "met"), [(1.01e-3, True), (1.03e-3, False)])
def test_a_lone_call_may_cost_two_percent_more(memory: float, met: bool) -> None:
    (goal,) = ledger_cost.goals(ledger_results(memory))
    assert goal.met is met


def test_calls_are_counted_with_one_caller_and_with_several() -> None:
    calls: list[int] = []
    for callers, expected in ((1, 10), (4, 8)):
        calls.clear()
        assert ledger_cost.seconds_of_each(lambda: calls.append(1), 10, callers) > 0
        assert len(calls) == expected


def test_a_simulated_fleet_runs_what_arrives() -> None:
    plan = Plan(servers=5, engines=1, resident=2, jobs_per_second=10.0, load=0.9)
    assert plan.job_seconds == pytest.approx(0.9)
    simulation = FleetSimulation(plan, seed=1)
    rates = simulation.run(200.0)
    assert rates["begin"] + rates["queue"] == pytest.approx(10.0, rel=0.1)
    assert rates["queue"] == pytest.approx(rates["claimed"], rel=0.1)
    assert rates["queue"] > 1  # Jobs did wait.
    assert rates["beat"] == pytest.approx(5 / 0.45, rel=0.02)
    assert simulation.longest > 1
    # With much room nothing waits.
    idle = FleetSimulation(replace(plan, load=0.01), seed=1).run(200.0)
    assert "queue" not in idle


def fleet_results(beside: float) -> Any:
    cost = {"wait": 1.5, "cpu": 0.5, "statements": 2}
    return replace(
        RESULTS,
        settings={
            "times": 10,
            "servers": 100,
            "seconds": 60.0,
            "ended": 1000,
            "plan": {"servers": 100, "engines": 8, "resident": 8, "jobs_per_second": 300.0},
        },
        figures={
            "operations": {"begin": cost, "beat": cost},
            "claims": {
                "quiet": [1e-3] * 3,
                "beside": [beside] * 3,
                "from the beginning": [9e-2] * 3,
            },
            "rates": {
                str(load): {"begin": 300.0, "beat": 200.0, "claimed": 9.0}
                for load in fleet_cost.LOADS
            },
        },
    )


def test_the_fleet_section() -> None:
    text = fleet_cost.BENCHMARK.section(fleet_results(2e-3))
    assert "| begin | 1.50 | 0.50 | 2 | 300 | 300 | 300 |" in text
    assert "| statements a second |  |  |  | 1000 | 1000 | 1000 |" in text
    assert "| CPUs of the database |  |  |  | 0.25 | 0.25 | 0.25 |" in text
    assert "1.00 ms in quiet, and 2.00 ms beside" in text
    assert "would take 90.00 ms" in text


@pytest.mark.parametrize(("beside", "met"), [(2e-3, True), (6e-3, False)])
def test_the_goal_of_a_claim(beside: float, met: bool) -> None:
    (goal,) = fleet_cost.goals(fleet_results(beside))
    assert goal.met is met


def cancels(removed: float) -> Any:
    seconds = {
        "reached": [3e-3, 4e-3, 9e-3],
        "answered": [7e-3] * 3,
        "removed": [removed] * 3,
    }
    settings = {"cancels": 3, "step_seconds": 0.05}
    return replace(RESULTS, settings=settings, figures={"cancels": seconds})


def test_the_section_of_cancels() -> None:
    text = fleet_cancels.BENCHMARK.section(cancels(0.03))
    assert "| the engine is asked to remove the job | 4.0 | 8.5 | 9.0 |" in text
    assert "its engine begins a step every 50 ms" in text


@pytest.mark.parametrize(("removed", "met"), [(0.06, True), (0.061, False)])
def test_a_cancel_may_take_a_step_and_ten_ms(removed: float, met: bool) -> None:
    reached, ended = fleet_cancels.goals(cancels(removed))
    assert (reached.bound, ended.bound) == pytest.approx((10.0, 60.0))
    assert (reached.met, ended.met) == (True, met)
