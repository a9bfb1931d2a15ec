"""What the peers' bench asks for, and what it makes of what it saw."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.arrivals import Arrivals, Drawn, Outcome
from bench.peers import page as page_module
from bench.peers.figures import goodput, runs_of
from bench.peers.goals import goals
from bench.peers.load import Load
from bench.peers.protocols import Ended
from bench.peers.scenarios import BUSY, CLOSED, FULL, LEAVERS, OVERLOAD, SCENARIOS, Scenario
from bench.peers.serving import Serving, by_settings, from_wire, to_wire
from bench.peers.trace import Trace, Work, mean_width, occupancy, read_trace, waste
from bench.peers.windows import best, tried
from bench.results import Results, Run, load, save
from bench.workload import Request, bursts, mixed, sized, with_cancels, with_deadlines
from darkroom_server.core.model import ModelRuntime
from tests.bench.test_results import MACHINE

RUNTIME = ModelRuntime(
    device="cpu",
    dtype="bfloat16",
    preset="fast",
    attention="sdpa",
    slice_size="",
    autocast=False,
    vae_tiling=False,
    channels_last=True,
    fp8_storage=False,
    safety_checker=False,
)


def test_bursts_come_together_and_at_the_mean_rate() -> None:
    arriving = bursts(mixed(4000, seed=0), rate=5.0, seed=0, size=8)
    moments = [request.arrival for request in arriving]
    assert moments == sorted(moments)
    assert len(set(moments)) == 500
    assert moments[-1] == pytest.approx(800, rel=0.1)


def test_deadlines_grow_with_the_steps_and_leavers_have_their_share() -> None:
    requests = with_deadlines(mixed(50, seed=0), 0.2)
    assert all(r.deadline == pytest.approx(r.steps * 0.2) for r in requests)
    leaving = [r for r in with_cancels(requests, 0.2, 0.1, seed=1) if r.cancel_after is not None]
    assert len(leaving) == 10
    assert all(0 <= (r.cancel_after or 0) <= 0.1 * r.steps for r in leaving)


def test_other_sizes_are_other_settings() -> None:
    first, second = sized(mixed(2, seed=0), (96,), seed=0), mixed(2, seed=0)
    assert first[0].settings != second[0].settings
    assert first[0].width == first[0].height == 96


def test_every_scenario_has_a_name_of_its_own_and_a_closed_loop_before_it() -> None:
    assert len(SCENARIOS) == len(FULL)
    seen = set()
    for scenario in FULL:
        assert scenario.load is None or scenario.mix in seen
        seen.add(scenario.mix)
        wanted = scenario.requests(20, seed=1, capacity=2.0, nominal=0.03, side=128)
        assert wanted == scenario.requests(20, seed=1, capacity=2.0, nominal=0.03, side=128)
        assert (scenario.load is None) == all(r.arrival == 0 for r in wanted)


def test_calls_have_equal_settings_and_are_not_too_wide() -> None:
    requests = [replace(r, steps=8 if r.index % 2 else 16, guidance_scale=4.0) for r in mixed(7, 0)]
    calls = [[request.index for request in call] for call in by_settings(requests, 3)]
    assert calls == [[0, 2, 4], [1, 3, 5], [6]]


def test_what_goes_over_the_wire_comes_back() -> None:
    request = sized(mixed(1, seed=0), (96,), seed=0)[0]
    assert from_wire(to_wire(request)) == request
    plain = mixed(1, seed=0)[0]
    assert from_wire(to_wire(plain)) == plain


def test_a_peer_is_told_on_its_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Serving(folder="f", runtime=RUNTIME, port=1, trace="t", widest=8, window=0.01)
    monkeypatch.setattr("sys.argv", ["server", *told.arguments()])
    assert Serving.of_command_line(None) == told


def test_a_trace_is_read_back_from_a_moment_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert read_trace(path, 0.0) == []
    trace = Trace(str(path))
    trace.note(1.0, [1])
    trace.note(0.0, [2, 3])
    first, second = read_trace(path, 0.0)
    assert second.indexes == (2, 3)
    assert first.ended - first.began == pytest.approx(1.0)
    assert read_trace(path, second.began) == [second]


WORKS = [Work(10.0, 12.0, (1, 2)), Work(12.0, 13.0, (1,)), Work(15.0, 16.0, (1, 2, 3, 4))]


def test_occupancy_is_a_mean_over_time() -> None:
    assert occupancy(WORKS, start=10.0, seconds=6.0, bin=2.0) == pytest.approx([2.0, 0.5, 2.0])
    assert mean_width(WORKS) == pytest.approx((2 * 2 + 1 + 4) / 4)
    assert mean_width([]) == 0.0


def test_waste_is_the_leavers_share_of_what_was_done() -> None:
    drawn = [
        Drawn(1, 8, arrival=0.0, latency=2.5, outcome=Outcome.CANCELLED),
        Drawn(2, 8, arrival=0.0, latency=2.5),
    ]
    found = waste(WORKS, drawn, start=10.0)
    assert found.cancels == 1
    assert found.total == pytest.approx(2.0 / 2 + 1.0 + 1.0 / 4)
    assert found.late == pytest.approx(0.5 + 0.25)
    assert found.last == pytest.approx(0.5)


class Scripted:
    """Answers at once, with an error, or never, by the request's steps."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = False

    async def ask(self, request: Request, name: str, seconds: float | None) -> bytes:
        self.asked.append(request.index)
        if request.steps == 1:
            raise Ended(Outcome.REFUSED, "full")
        if request.steps == 2:
            await asyncio.Event().wait()
        return b"image"

    async def close(self) -> None:
        self.closed = True


def drawn_by_load(requests: list[Request], callers: int | None = None) -> list[Drawn]:
    asker = Scripted()
    under_test = Load(lambda: asker)
    drawn = under_test.draw(Arrivals(requests, callers))
    under_test.close()
    assert asker.closed
    assert sorted(asker.asked) == sorted(each.index for each in drawn)
    return sorted(drawn, key=lambda each: each.index)


def test_the_load_tells_how_each_request_ended() -> None:
    plain, refused, leaving, late = mixed(4, seed=0)
    drawn = drawn_by_load(
        [
            plain,
            replace(refused, steps=1),
            replace(leaving, steps=2, deadline=60.0, cancel_after=0.01),
            replace(late, steps=2, deadline=0.01, cancel_after=60.0),
        ]
    )
    assert [each.outcome for each in drawn] == [
        Outcome.IMAGE,
        Outcome.REFUSED,
        Outcome.CANCELLED,
        Outcome.EXPIRED,
    ]
    assert drawn[2].latency >= 0.01


def test_the_load_keeps_to_a_schedule_and_to_its_callers() -> None:
    scheduled = [replace(r, arrival=0.02 * r.index) for r in mixed(5, seed=0)]
    assert [each.arrival for each in drawn_by_load(scheduled)] == [r.arrival for r in scheduled]
    assert len(drawn_by_load(mixed(20, seed=0), callers=3)) == 20


def run(scenario: str, contender: str, slowness: float, **fields: Any) -> Run:
    drawn = [
        Drawn(i, steps, arrival=i / 2, latency=steps * slowness, deadline=4.0)
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
        contender=contender,
        round=0,
        nominal_before=0.025,
        nominal_after=0.025,
        drawn=drawn,
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
    settings={"rounds": 1, "widest": 8, "lone_steps": 16, "window_seconds": 0.01},
    figures={
        "versions": {name: {"torch": "2.13.0"} for name in ("grpc", "ray", "darkroom")},
        "equality": dict.fromkeys(("grpc", "ray", "darkroom"), EQUAL),
        "lost": ["(d) Triton is left out: no such file"],
    },
    runs=[
        run(scenario.name, contender, slowness)
        for scenario in (CLOSED, BUSY, OVERLOAD, LEAVERS)
        for contender, slowness in (("grpc", 0.4), ("ray", 0.2), ("darkroom", 0.1))
    ],
)


def trial(window: float, slowness: float) -> Run:
    found = run(Scenario(window=window).name, "ray", slowness)
    return replace(found, callers=8, figures={**found.figures, "window_seconds": window})


def test_the_shortest_window_that_is_good_enough_is_best() -> None:
    assert best({0.002: 2.0, 0.01: 2.97, 0.05: 3.0}) == 0.01
    assert best({0.002: 2.0, 0.01: 2.9, 0.05: 3.0}) == 0.05


def test_the_page_tells_which_windows_were_tried() -> None:
    other = run(CLOSED.name, "ray", 0.2)
    later = replace(other, figures={**other.figures, "window_seconds": 0.01})
    runs = [*RESULTS.runs, later, trial(0.002, 0.4), trial(0.01, 0.05)]
    assert set(tried(runs)["ray"]) == {0.002, 0.01}
    page = page_module.page(replace(RESULTS, runs=runs), "images", [])
    assert "a batch waits 10 ms ((c) Ray Serve) for company" in page
    assert "| images/s | 2 ms | 10 ms |" in page
    assert "### How long a batch waits" not in page_module.page(RESULTS, "images", [])


def test_goals_are_ratios_to_the_best_rival() -> None:
    reached = {goal.name: goal for goal in goals(RESULTS)}
    assert reached["p50 of 8 steps at 0.9, against the best"].reached == pytest.approx(0.5)
    assert reached["p95 of 40 steps at 0.9, against (a)"].reached == pytest.approx(0.25)
    assert reached["p95 of all at 0.9, against the best"].met
    # 40 steps take Darkroom 4 s, and the best rival 8 s, which is too late.
    assert reached["images/s within the deadline at 1.1, against the best"].reached == 1.5
    # 0.05 s after two cancels are one step of 25 ms for each.
    assert reached["steps after a cancel, for each"].reached == pytest.approx(1.0)


def test_goals_without_a_rival_or_a_run_are_left_out() -> None:
    alone = replace(RESULTS, runs=[r for r in RESULTS.runs if r.contender == "darkroom"])
    names = [goal.name for goal in goals(alone)]
    assert names == ["a lone request, against bare pipe()", "steps after a cancel, for each"]
    assert goals(replace(RESULTS, runs=[])) == []


def test_the_page_says_what_was_met_what_was_missed_and_who_is_missing() -> None:
    page = page_module.page(RESULTS, "images", [("load.png", "A plot. More of it.")])
    assert "| p50 of 8 steps at 0.9, against the best | ≤ 0.4 | 0.50 | **no** |" in page
    assert "| p95 of all at 0.9, against the best | ≤ 0.6 | 0.50 | yes |" in page
    assert "(d) Triton is left out: no such file." in page
    assert "![A plot](images/load.png)\n\nA plot. More of it." in page
    assert "| (c) Ray Serve | 8 of 8 | 0 | equal | 7 of 8 | 51.2 dB |" in page
    assert "### Open loop, mixed, deadlines, 110% of (a)'s capacity" in page
    assert "| CPU s/image | idle, % of a core |" in page


def test_only_images_count(tmp_path: Path) -> None:
    whole = RESULTS.runs[0]
    missed = [replace(d, outcome=Outcome.EXPIRED) if d.steps == 8 else d for d in whole.drawn]
    results = replace(RESULTS, runs=[replace(whole, drawn=missed)])
    again = load(save(results, tmp_path))
    assert [d.outcome for d in again.runs[0].drawn] == [d.outcome for d in missed]
    assert again.runs[0].figures == whole.figures
    page = page_module.page(again, "images", [])
    assert "none" in page
    assert goodput(again.runs[0]) == 0.0
    assert list(runs_of(again, CLOSED.name)) == ["grpc"]
