"""The production trace: its requests, virtual time, and the policies beside each other."""

import argparse
import asyncio
import gzip
import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.report.results import newest
from bench.trace import simulation
from bench.trace.__main__ import SIMULATED, main, names_of_files
from bench.trace.bounds import least_loads
from bench.trace.costs import BYTES, LoadCosts
from bench.trace.figures import Swaps, figures_of
from bench.trace.policies import Policy
from bench.trace.report import goals
from bench.trace.requests import (
    FIRST_SHARES,
    Kind,
    TraceRequest,
    at_load,
    hours,
    made_up,
    read,
    shares_of_models,
    slice_from,
)
from bench.trace.simulation import Machine, alone, simulate, steps_per_second
from bench.trace.virtual import VirtualEngine, run_virtually
from bench.workload.arrivals import Answer, Outcome
from darkroom_server.core.model_runtime import ModelSpeed
from tests.bench.test_results import RESULTS

MACHINE = Machine(
    speed=ModelSpeed(passes=((2, 0.013), (4, 0.017), (8, 0.024), (16, 0.040)), decode=0.0053),
    max_rows=16,
)


def request(index: int, model: str, arrival: float = 0.0, **fields: Any) -> TraceRequest:
    defaults = {"steps": 30, "guidance_scale": 7.5, "seed": 0, "prompt": ""}
    return TraceRequest(index, arrival=arrival, model=model, **{**defaults, **fields})


def test_the_rows_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    names = "gmt_create,predict_type,groupId,num_images_per_prompt,num_inference_steps"
    with gzip.open(path, "wt") as file:
        file.write(
            f"{names},checkpoint_model_version_id,num_lora\n"
            "2024-11-15 16:57:50,TXT_2_IMG,G7,1.0,30.0,M5,0\n"
            "2024-11-15 16:58:50,IMG_2_IMG,G8,,40.0,M2,2\n"
            "2024-11-15 18:00:00,INPAINTING,G7,4.0,30.0,M5,1\n"
        )
    found = read(path)
    assert [(r.arrival, r.model, r.images, r.steps) for r in found] == [
        (0.0, "m00", 1, 30),
        (60.0, "m01", 1, 40),
        (3730.0, "m00", 4, 30),
    ]
    assert [(r.kind, r.group, r.loras) for r in found] == [
        (Kind.TEXT, "G7", 0),
        (Kind.IMAGE, "G8", 2),
        (Kind.INPAINT, "G7", 1),
    ]
    assert [number for number, _ in hours(found)] == [0, 1]


def test_a_made_up_trace_has_the_shape_of_the_real_one() -> None:
    found = made_up(5000, seed=1)
    assert [r.index for r in found] == list(range(5000))
    assert all(a.arrival <= b.arrival for a, b in itertools.pairwise(found))
    shares = shares_of_models(found)
    assert shares[0] == pytest.approx(FIRST_SHARES[0], abs=0.05)
    assert sum(shares[:4]) == pytest.approx(sum(FIRST_SHARES[:4]), abs=0.05)
    assert 40 < len(shares) <= 86
    assert sum(r.steps == 30 for r in found) == pytest.approx(4535, abs=100)
    assert sum(r.loras > 0 for r in found) == pytest.approx(835, abs=100)
    assert found == made_up(5000, seed=1)
    assert found != made_up(5000, seed=2)


def test_each_hour_asks_for_the_load() -> None:
    found = slice_from(made_up(3000), busy=True, count=1000)
    compressed = at_load(found, 100.0)
    assert [r.model for r in compressed] == [r.model for r in found]
    assert all(a.arrival <= b.arrival for a, b in itertools.pairwise(compressed))
    work = sum(r.images * r.steps for r in found)
    assert compressed[-1].arrival == pytest.approx(work / 100.0, rel=0.1)
    median = slice_from(made_up(3000), busy=False, count=1000)
    first = [len(next(hours(each))[1]) for each in (found, median)]
    assert first[0] > first[1]


def test_virtual_time_passes_without_waiting() -> None:
    began = time.perf_counter()

    async def sleep() -> float:
        before = time.monotonic()
        await asyncio.gather(asyncio.sleep(3600.0), asyncio.sleep(10.0))
        return time.monotonic() - before

    assert run_virtually(sleep) == pytest.approx(3600.0)
    assert time.perf_counter() - began < 60.0


def test_loads_cost_what_those_of_a_real_model_would() -> None:
    costs = LoadCosts()
    read, copy = BYTES / 2e9, BYTES / 20e9
    assert costs.cost() == pytest.approx(read + copy)
    assert costs.cost(in_host=True) == pytest.approx(copy)
    assert costs.cost(host_only=True) == pytest.approx(read)
    costs.record(host_only=True)
    costs.record(in_host=True)
    costs.record()
    assert (costs.loads, costs.from_disk) == (2, 2)
    assert costs.bytes_moved == 4 * BYTES
    assert costs.seconds == pytest.approx(2 * read + 2 * copy)
    assert LoadCosts(scale=0.0).cost() == 0.0


def fewest(windows: list[str], places: int) -> int:
    """By trying everything: each window is served in any order."""
    found: dict[frozenset[str], int] = {frozenset(): 0}
    for window in windows:
        after: dict[frozenset[str], int] = {}
        for held, loads in found.items():
            for order in itertools.permutations(sorted({*window})):
                states = {held: loads}
                for model in order:
                    nexts: dict[frozenset[str], int] = {}
                    for now, count in states.items():
                        if model in now:
                            nexts[now] = min(count, nexts.get(now, count))
                            continue
                        for gone in [None] if len(now) < places else now:
                            then = now - {gone} | {model}
                            nexts[then] = min(count + 1, nexts.get(then, count + 1))
                    states = nexts
                for now, count in states.items():
                    after[now] = min(count, after.get(now, count))
        found = after
    return min(found.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=3), max_size=7),
    st.integers(2, 3),
)
def test_the_fewest_loads_are_those_of_a_policy_that_knows_the_trace(
    windows: list[list[str]], places: int
) -> None:
    trace = [
        request(0, model, at + number / 10)
        for at, window in enumerate(windows)
        for number, model in enumerate(window)
    ]
    together = ["".join(window) for window in windows]
    least = least_loads(trace, places, 1.0)
    assert fewest(together, places + 1) <= least <= fewest(together, places)
    in_order = [model for window in windows for model in window]
    assert least_loads(trace, places) == fewest(in_order, places)


class Checked(VirtualEngine):
    """Asserts at each load that neither memory gets more models than it has places for."""

    device = host = 0

    def load_model(self, id: str, *, keep: bool = False, host_only: bool = False) -> None:
        super().load_model(id, keep=keep, host_only=host_only)
        assert host_only or len(self.resident | {id}) <= Checked.device
        assert len(self.in_host | {id}) <= Checked.host or not (keep or host_only)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 60.0), st.sampled_from("abcdefgh"), st.sampled_from([1, 2, 8])),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([Policy.OURS, Policy.FIRST_COME, Policy.LRU]),
)
def test_no_memory_holds_more_than_its_budget_and_everybody_is_served(
    arrivals: list[tuple[float, str, int]], device: int, more: int, policy: Policy
) -> None:
    """The engine itself asserts that nothing with jobs is evicted, and that lanes are free."""
    trace = [
        request(n, model, at, images=images)
        for n, (at, model, images) in enumerate(sorted(arrivals))
    ]
    machine = replace(MACHINE, device_models=device, host_models=device + more)
    Checked.device, Checked.host = device, device + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "VirtualEngine", Checked)
        found = simulate(trace, machine, policy)
    assert len(found.answers) == len(trace)
    assert all(answer.outcome is Outcome.IMAGE for answer in found.answers)


def test_a_model_in_the_hosts_memory_does_not_wait_for_one_on_disk() -> None:
    """The negative control: with no more memory of the host than the device has, it waits."""
    trace = [request(0, "a"), request(1, "b", 10.0), request(2, "c", 20.0), request(3, "a", 20.1)]
    seconds = {}
    for host in (3, 1):
        machine = replace(MACHINE, device_models=1, host_models=host)
        answers = {a.index: a.latency for a in simulate(trace, machine, Policy.OURS).answers}
        seconds[host] = answers[3]
    assert seconds[3] < 1.5
    assert seconds[1] > 3.0


def test_a_lone_request_takes_its_batches() -> None:
    assert alone(MACHINE, request(0, "a")) == pytest.approx(30 * 0.013 + 0.0053)
    assert alone(MACHINE, request(0, "a", images=8)) == pytest.approx(
        30 * 0.040 + 8 * 0.0053, rel=0.02
    )


def test_jobs_of_resident_models_go_first_but_not_in_the_order_of_arrival() -> None:
    """Negative control of the exchange: the same requests, and other orders."""
    trace = [request(0, "a")]
    trace += [request(1, "b", 20.0)]
    trace += [request(2 + n, "a", 20.1 + n / 10) for n in range(5)]
    one = replace(MACHINE, device_models=1)
    ends = {}
    for policy in Policy:
        found = simulate(trace, one, policy)
        assert all(answer.outcome is Outcome.IMAGE for answer in found.answers)
        ends[policy] = [a.index for a in sorted(found.answers, key=lambda a: a.arrival + a.latency)]
    assert ends[Policy.FIRST_COME][:2] == [0, 1]
    two = replace(MACHINE, device_models=2)
    overtaken = simulate(trace, two, Policy.OURS)
    held_up = simulate(trace, two, Policy.FIRST_COME)
    waits = [max(a.latency for a in each.answers if a.index > 1) for each in (overtaken, held_up)]
    assert waits[0] < 1.0, "the model is there"
    assert waits[1] > 3.0, "it waits for the load of another"


def test_ours_is_in_time_more_often_with_fewer_loads() -> None:
    part = slice_from(made_up(4000), busy=False, count=300)
    lone = {(r.steps, r.images): r for r in part}
    seconds = {kind: alone(MACHINE, each) for kind, each in lone.items()}
    each_alone = {r.index: seconds[r.steps, r.images] for r in part}
    trace = at_load(part, 0.8 * steps_per_second(part, each_alone))
    found = {p: simulate(trace, MACHINE, p).figures(each_alone) for p in Policy}
    ours, first = found[Policy.OURS], found[Policy.FIRST_COME]
    assert all(each["failed"] == 0 and each["requests"] == len(trace) for each in found.values())
    assert ours["attainment"]["5"] > 1.3 * first["attainment"]["5"]
    assert ours["loads"] < first["loads"]
    assert ours["longest_wait"] < MACHINE.swap_wait
    assert found == {p: simulate(trace, MACHINE, p).figures(each_alone) for p in Policy}


def test_the_figures_of_a_run() -> None:
    answers = [
        Answer(0, 30, 0.0, 1.5, images=2),
        Answer(1, 30, 5.0, 4.0),
        Answer(2, 30, 6.0, 30.0),
        Answer(3, 30, 6.0, 0.1, Outcome.FAILED),
    ]
    swaps = Swaps(loads=3, from_disk=1, bytes_moved=7, seconds=9.0, longest_wait=2.0)
    found = figures_of(answers, dict.fromkeys(range(4), 1.0), swaps)
    assert found["attainment"] == {"2": 0.25, "5": 0.5, "10": 0.5}
    assert found["goodput"] == pytest.approx(3 / 36, abs=1e-4)
    assert (found["failed"], found["seconds"], found["loading"]) == (1, 36.0, 0.25)


def run(policy: Policy, attained: float, loads: int, wait: float) -> dict[str, Any]:
    return {
        "slice": "all",
        "load": 0.9,
        "policy": policy.value,
        "requests": 9,
        "attainment": {"2": 0.1, "5": attained, "10": 1.0},
        "goodput": 1.0,
        "images_per_second": 2.0,
        "latency": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
        "loads": loads,
        "from_disk": 1,
        "bytes_moved": 7e9,
        "longest_wait": wait,
        "longest_load": 4.0,
        "longest_run": 2.0,
    }


@pytest.mark.parametrize(("attained", "met"), [(0.8, True), (0.5, False)])
def test_the_section_and_its_goals(attained: float, met: bool) -> None:
    runs = [
        run(Policy.OURS, attained, 10, 12.0),
        run(Policy.FIRST_COME, 0.1, 30, 90.0),
        run(Policy.LRU, 0.5, 15, 60.0),
    ]
    options: dict[str, Any] = {"swap_wait": 10.0, "device_models": 4, "host_models": 20}
    options |= {"batch_times": "2:13", "decode": 5.3}
    figures = {"is_real_trace": True, "requests": 9, "runs": runs}
    results = replace(RESULTS, bench="trace", figures=figures, settings=options)
    page = SIMULATED.section(results)
    assert "| (b) LRU without lookahead | 10% / 50% / 100% | 1.00 of 2.00 |" in page
    in_time, loads, wait = goals(results)
    assert in_time.met is met
    assert "Ray Serve" not in page
    assert loads.reached == pytest.approx(1 / 3)
    assert wait.reached == pytest.approx(12.0 / 16.0)


def test_the_smoke_form_writes_its_section(tmp_path: Path) -> None:
    docs, results = tmp_path / "docs", tmp_path / "results"
    main(["trace", "--smoke", "--docs", str(docs), "--results", str(results)])
    found = newest("trace", results)
    assert found is not None
    assert [each["policy"] for each in found.figures["runs"]] == [*Policy]
    assert "(a) first come, first served" in (docs / "benchmarks.md").read_text()


def test_results_have_the_names_of_files_only() -> None:
    options = argparse.Namespace(trace="/elsewhere/trace.csv.gz", resume="")
    assert names_of_files(options) == {"trace": "trace.csv.gz"}
