"""The peers' figures, goals and section, from handwritten results."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.peers.batch_timeout_search import best, tried
from bench.peers.report.figures import (
    goodput,
    images_per_second,
    latency_of,
    ratios,
    rounds_of,
    runs_of,
)
from bench.peers.report.goals import goals
from bench.peers.report.section import section
from bench.peers.report.slo import slo_table
from bench.peers.scenarios import (
    BUSY,
    CANCELLED,
    CLOSED,
    OVERLOAD,
    SATURATED,
    UNIFORM_CLOSED,
    Scenario,
)
from bench.report.results import Results, Run, load, save
from bench.workload.arrivals import Answer, Outcome
from tests.bench.test_results import MACHINE


def run(scenario: str, peer: str, slowness: float, **fields: Any) -> Run:
    answers = [
        Answer(i, steps, arrival=i / 2, latency=steps * slowness, deadline=4.0)
        for i, steps in enumerate((8, 16, 40) * 20)
    ]
    figures = {
        "ready_seconds": 5.0,
        "max_rows": 16,
        "first_image_seconds": 0.3,
        "cpu_seconds": 60.0,
        "footprint": {"processes": 2, "proportional": 2**30, "resident": 2**31},
        "width": 1.0,
        "waste": {"total": 1.0, "late": 0.05, "last": 0.05, "cancels": 2},
        "occupancy": [1.0, 2.0],
        "idle_cpu": 0.25,
        "lone": [{"peer": 1.02, "pipe": 1.0}] if scenario == CLOSED.name else [],
    }
    return Run(
        scenario=scenario,
        peer=peer,
        round=0,
        nominal_before=0.025,
        nominal_after=0.025,
        answers=answers,
        rate=None if "closed" in scenario else 2.0,
        callers=8 if "closed" in scenario else None,
        figures=figures,
        **fields,
    )


EQUAL = {
    "alone": 8,
    "identical": 8,
    "largest": 0,
    "lowest_psnr": None,
    "together": 8,
    "together_identical": 7,
    "together_lowest_psnr": 51.23,
}

RESULTS = Results(
    bench="peers",
    date="2026-11-24",
    machine=MACHINE,
    versions={"torch": "2.13.0"},
    model={
        "id": "demo",
        "width": 128,
        "height": 128,
        "scheduler": "ddim",
        "runtime": {"dtype": "bfloat16", "attention": "sdpa", "channels_last": True},
    },
    settings={"rounds": 1, "max_batch_images": 8, "lone_steps": 16, "batch_timeout_seconds": 0.01},
    figures={
        "versions": {name: {"torch": "2.13.0"} for name in ("grpc", "ray", "darkroom")},
        "equality": dict.fromkeys(("grpc", "ray", "darkroom"), EQUAL),
        "lost": ["(d) Triton is omitted: no such file"],
    },
    runs=[
        run(scenario.name, peer, slowness)
        for scenario in (CLOSED, BUSY, OVERLOAD, CANCELLED)
        for peer, slowness in (("grpc", 0.4), ("ray", 0.2), ("darkroom", 0.1))
    ],
)


def trial(timeout: float, slowness: float) -> Run:
    found = run(Scenario(batch_timeout=timeout).name, "ray", slowness)
    return replace(
        found,
        # In a closed loop a slow server gets its requests later.
        answers=[replace(each, arrival=each.arrival * slowness) for each in found.answers],
        callers=8,
        figures={**found.figures, "batch_timeout_seconds": timeout},
    )


def test_the_shortest_batch_timeout_that_is_good_enough_is_best() -> None:
    assert best({0.002: 2.0, 0.01: 2.97, 0.05: 3.0}) == 0.01
    assert best({0.002: 2.0, 0.01: 2.9, 0.05: 3.0}) == 0.05


def test_the_section_shows_the_batch_timeouts_that_were_tried() -> None:
    other = run(CLOSED.name, "ray", 0.2)
    later = replace(other, figures={**other.figures, "batch_timeout_seconds": 0.01})
    runs = [*RESULTS.runs, later, trial(0.002, 0.4), trial(0.01, 0.05)]
    assert set(tried(runs)["ray"]) == {0.002, 0.01}
    page = section([replace(RESULTS, runs=runs)], "images", [[]])
    assert "a batch waits 10 ms ((c) Ray Serve) to fill" in page
    assert "| images/s | 2 ms | 10 ms |" in page
    assert "#### Batch timeout" not in section([RESULTS], "images", [[]])


def test_goals_are_ratios_to_the_best_other_peer() -> None:
    reached = {goal.name: goal for goal in goals([RESULTS])}
    assert reached["p50 of 8 steps at 0.9, against the best"].reached == pytest.approx(0.5)
    assert reached["p95 of 40 steps at 0.9, against (a)"].reached == pytest.approx(0.25)
    assert not reached["p95 of 8 steps at 0.9, against the best"].met
    assert reached["p95 of 40 steps at 0.9, against (a)"].met
    # 40 steps take Darkroom 4 s, and the best other peer 8 s, which is too late.
    assert reached["images/s within the deadline at 1.1, against the best"].reached == 1.5
    # 0.05 s after two cancels are one step of 25 ms for each.
    assert reached["steps after a cancel, for each"].reached == pytest.approx(1.0)


def in_rounds(*slowness: tuple[float, float]) -> Results:
    """Busy rounds of another peer and of Darkroom, by their slowness."""
    runs = [
        replace(run(BUSY.name, peer, slow), round=index)
        for index, pair in enumerate(slowness)
        for peer, slow in zip(("grpc", "darkroom"), pair, strict=True)
    ]
    return replace(RESULTS, runs=runs)


def test_a_ratio_is_taken_within_a_round_even_across_machines() -> None:
    # Of the medians of all, 0.2 over 0.4, it would be 0.5.
    fast, slow = in_rounds((0.2, 0.02)), in_rounds((0.4, 0.2), (1.0, 0.4))
    found = {goal.name: goal for goal in goals([fast, slow])}
    tail = found["p95 of all at 0.9, against the best"]
    assert tail.reached == pytest.approx(0.4)
    assert tail.between == pytest.approx((0.1, 0.5))
    page = section([fast, slow], "images", [[], []])
    assert "| mixed 0.9 | 3 |  | 0.40× (0.10–0.50) |" in page
    assert "| p95 of all at 0.9, against the best | ≤ 0.4 | 0.40 | 0.10–0.50 | yes |" in page
    assert page.count(f"### {MACHINE.text}, 2026-11-24") == 2


def test_the_goals_have_the_newest_rounds_of_a_scenario() -> None:
    before, again = in_rounds((0.4, 0.2), (1.0, 0.4)), in_rounds((0.2, 0.02))
    again = replace(again, date="2026-11-25")
    found = {goal.name: goal for goal in goals([again, before])}
    assert found["p95 of all at 0.9, against the best"].reached == pytest.approx(0.1)


def test_the_best_other_peer_is_one_for_all_rounds() -> None:
    """The best of each round would be the luckiest one, on a machine whose speed changes."""
    slowness = {"grpc": (0.2, 0.6, 0.4), "ray": (0.4, 0.3, 0.25), "darkroom": (0.1, 0.15, 0.1)}
    rounds = [
        {peer: run(BUSY.name, peer, slow[index]) for peer, slow in slowness.items()}
        for index in range(3)
    ]
    tail = latency_of(None, 0.95)
    # Beside (a) it would be 0.5, 0.25 and 0.25.
    assert ratios(rounds, tail, most=False) == pytest.approx([0.25, 0.5, 0.4])
    assert ratios(rounds, tail, most=False, name="grpc") == pytest.approx([0.5, 2.0, 1.6])


def beside_alone(scenario: str, peer: str, slowness: float) -> Run:
    """A run whose requests take 0.1 s a step alone."""
    found = run(scenario, peer, slowness)
    alone = [0.1 * answer.steps for answer in found.answers]
    return replace(found, figures={**found.figures, "alone_seconds": alone})


def test_slo_attainment_is_a_curve_against_load() -> None:
    runs = [
        beside_alone(scenario.name, peer, slowness)
        for scenario, slow in ((BUSY, 0.3), (SATURATED, 0.6))
        for peer, slowness in (("grpc", slow), ("darkroom", 0.15))
    ]
    # A request without an image is not in time.
    late = replace(runs[-1].answers[0], outcome=Outcome.REJECTED)
    runs[-1] = replace(runs[-1], answers=[late, *runs[-1].answers[1:30]])
    measured = replace(RESULTS, runs=runs)
    table = slo_table(measured)
    assert "|  | mixed 0.9 | mixed 1 |" in table
    assert "| (a) gRPC and a lock | 0% / 100% / 100% | 0% / 0% / 100% |" in table
    assert "| (e) Darkroom | 100% / 100% / 100% | 97% / 97% / 97% |" in table
    assert table in section([measured], "images", [[]])
    assert "SLO" not in section([RESULTS], "images", [[]])
    (reached,) = [goal for goal in goals([measured]) if goal.name.startswith("SLO")]
    assert math.isinf(reached.reached)


def test_a_run_without_lone_latencies_leaves_its_cell_empty() -> None:
    runs = [
        beside_alone(BUSY.name, "grpc", 0.3),
        run(BUSY.name, "darkroom", 0.1),
        beside_alone(SATURATED.name, "darkroom", 0.1),
        run(SATURATED.name, "grpc", 0.3),
    ]
    measured = replace(RESULTS, runs=runs)
    assert "| (e) Darkroom |  | 100% / 100% / 100% |" in slo_table(measured)
    assert not [goal for goal in goals([measured]) if goal.name.startswith("SLO")]


def test_rounds_of_an_earlier_version_of_a_scenario_give_no_ratios() -> None:
    def alike(steps: int) -> Results:
        runs = [run(UNIFORM_CLOSED.name, peer, 0.1) for peer in ("grpc", "darkroom")]
        return replace(
            RESULTS,
            runs=[
                replace(r, answers=[replace(a, steps=steps, images=2) for a in r.answers])
                for r in runs
            ],
        )

    assert "| uniform closed | 1 | 1.00× |" in section([alike(30)], "images", [[]])
    before = section([alike(16)], "images", [[]])
    assert "| uniform closed |" not in before
    assert "all alike (16 steps, guidance 7.5), images of a request: 2 100%" in before


def test_compiled_peers_are_compared_with_compiled_ones_and_ours_with_eager_ones_too() -> None:
    slowness = {
        "grpc": 0.4,
        "ray": 0.3,
        "darkroom": 0.2,
        "grpc-compiled": 0.3,
        "ray-compiled": 0.24,
        "darkroom-compiled": 0.12,
    }
    runs = {
        name: replace(
            run(CLOSED.name, name, each),
            answers=[Answer(i, 8, arrival=i * each, latency=each) for i in range(20)],
        )
        for name, each in slowness.items()
    }

    def found(name: str, **options: Any) -> float:
        (ratio,) = ratios([runs], images_per_second, most=True, name=name, **options)
        return ratio

    assert found("darkroom") == pytest.approx(0.3 / 0.2)
    assert found("darkroom-compiled") == pytest.approx(0.24 / 0.12)
    assert found("darkroom-compiled", compiled=False) == pytest.approx(0.3 / 0.12)
    assert found("grpc-compiled") == pytest.approx(0.24 / 0.3)
    every = [replace(RESULTS, runs=list(runs.values()))]
    reached = {goal.name: goal.reached for goal in goals(every)}
    loop = "images/s in the closed loop"
    assert reached[f"{loop}, against the best"] == pytest.approx(1.5)
    assert reached[f"{loop}, compiled, against the best eager one"] == pytest.approx(2.5)
    assert reached[f"{loop}, compiled, against the best compiled one"] == pytest.approx(2.0)


def test_an_interrupted_round_is_omitted() -> None:
    whole = in_rounds((0.4, 0.2), (0.4, 0.1))
    assert len(rounds_of(whole, BUSY.name)) == 2
    cut = replace(whole, runs=whole.runs[:-1])
    assert [list(runs) for runs in rounds_of(cut, BUSY.name)] == [["grpc", "darkroom"]]
    without = replace(whole, runs=[r for r in whole.runs if r.peer == "grpc"])
    assert "Open loop" not in section([without], "images", [[]])


def test_a_peer_without_an_image_is_not_the_best() -> None:
    results = in_rounds((0.4, 0.2))
    serial, ours = results.runs
    late = [replace(each, outcome=Outcome.EXPIRED) for each in serial.answers]
    nothing = replace(serial, answers=late)
    assert ratios([{"grpc": nothing, "darkroom": ours}], goodput, most=True) == [math.inf]
    other = {"grpc": nothing, "ray": serial, "darkroom": ours}
    assert ratios([other], latency_of(None, 0.5), most=False) == [pytest.approx(0.5)]


def test_goals_without_another_peer_or_a_run_are_omitted() -> None:
    alone = replace(RESULTS, runs=[r for r in RESULTS.runs if r.peer == "darkroom"])
    names = [goal.name for goal in goals([alone])]
    assert names == ["a lone request, against bare pipe()", "steps after a cancel, for each"]
    assert goals([replace(RESULTS, runs=[])]) == []


def test_the_section_has_goals_that_were_met_and_missed_and_the_failed_peers() -> None:
    page = section([RESULTS], "images", [[("load.png", "A plot. More of it.")]])
    assert "| p50 of 8 steps at 0.9, against the best | ≤ 0.4 | 0.50 |  | **no** |" in page
    assert "| p95 of 40 steps at 0.9, against (a) | ≤ 1 | 0.25 |  | yes |" in page
    assert "(d) Triton is omitted: no such file." in page
    assert "![A plot](images/load.png)\n\nA plot. More of it." in page
    assert "| (c) Ray Serve | 8 of 8 | 0 | equal | 7 of 8 | 51.2 dB |" in page
    assert "#### Open loop, mixed, deadlines, 110% of (a)'s capacity" in page
    assert "| CPU s/image | idle, % of a core |" in page


def test_only_images_count(tmp_path: Path) -> None:
    whole = RESULTS.runs[0]
    missed = [replace(d, outcome=Outcome.EXPIRED) if d.steps == 8 else d for d in whole.answers]
    results = replace(RESULTS, runs=[replace(whole, answers=missed)])
    again = load(save(results, tmp_path))
    assert [d.outcome for d in again.runs[0].answers] == [d.outcome for d in missed]
    assert again.runs[0].figures == whole.figures
    page = section([again], "images", [[]])
    assert "none" in page
    assert goodput(again.runs[0]) == 0.0
    assert list(runs_of(again, CLOSED.name)) == ["grpc"]
