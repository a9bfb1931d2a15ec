from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.engine.report import goals, section
from bench.micro import boundary, exactness, memory
from bench.report.machine import MachineInfo
from bench.report.markdown import replace_section, write_section
from bench.report.results import Results, Run, load, newest, save
from bench.workload.arrivals import Answer

MACHINE = MachineInfo(cores=2, cpu="AMD EPYC", memory_gib=23)


def run(scenario: str, peer: str, slowness: float) -> Run:
    """100 images of each class, at ``slowness`` seconds a step."""
    answers = [
        Answer(index=i, steps=steps, arrival=float(i), latency=steps * slowness)
        for i, steps in enumerate((8, 16, 40) * 100)
    ]
    closed = scenario == "closed"
    return Run(
        scenario=scenario,
        peer=peer,
        round=0,
        nominal_before=0.02,
        nominal_after=0.03,
        answers=answers,
        rate=None if closed else 2.0,
        callers=8 if closed else None,
    )


RESULTS = Results(
    bench="engine",
    date="2026-11-23",
    machine=MACHINE,
    versions={"torch": "2.13.0"},
    model={
        "id": "demo",
        "width": 128,
        "height": 128,
        "scheduler": "ddim",
        "runtime": {"dtype": "float32", "attention": "sdpa", "channels_last": True},
    },
    settings={"rounds": 1, "callers": 8, "max_batch_images": 8, "lone_steps": 16},
    figures={
        "passes": [{"rows": 2, "milliseconds": 25.0, "count": 12}],
        "lone": [{"engine": 1.02, "pipe": 1.0}, {"engine": 1.0, "pipe": 1.0}],
    },
    runs=[
        run(scenario, peer, slowness)
        for scenario in ("closed", "open 0.7", "open 0.9")
        for peer, slowness in (("serial", 0.4), ("static", 0.2), ("engine", 0.1))
    ],
)


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    path = save(RESULTS, tmp_path)
    assert path.name == "engine-2026-11-23-2-core-amd-epyc.json"
    again = load(path)
    assert again.figures == RESULTS.figures
    for run, expected in zip(again.runs, RESULTS.runs, strict=True):
        latencies = [each.latency for each in expected.answers]
        assert [each.latency for each in run.answers] == pytest.approx(latencies)


def test_the_images_of_an_answer_are_saved(tmp_path: Path) -> None:
    whole = RESULTS.runs[0]
    several = [replace(e, images=4 if e.index == 100 else 1) for e in whole.answers]
    runs = [replace(whole, answers=several)]
    again = load(save(replace(RESULTS, runs=runs), tmp_path)).runs[0]
    assert [each.images for each in again.answers[99:102]] == [1, 4, 1]
    assert again.images_while_busy == whole.images_while_busy + 3


def closed_loop(first: Sequence[float], seconds: float) -> Run:
    """Callers whose ``first`` requests take so long, and all later ones ``seconds``."""
    answers: list[Answer] = []
    for latency in first:
        arrival = 0.0
        for wait in [latency, *[seconds] * 4]:
            answers.append(Answer(len(answers), 8, arrival, wait))
            arrival += wait
    return replace(RESULTS.runs[0], answers=answers, callers=len(first))


def test_static_batches_and_requests_that_end_one_by_one_are_measured_alike() -> None:
    """Both make four images a second; counted from the start, static batches seem faster."""
    static = closed_loop([2.0] * 8, 2.0)
    one_by_one = closed_loop([2.0 + 0.25 * caller for caller in range(8)], 2.0)
    found = [run.images_while_busy / run.busy_seconds for run in (static, one_by_one)]
    assert found == pytest.approx([4.0, 4.0])
    ends = [max(each.arrival for each in run.answers) for run in (static, one_by_one)]
    assert [32 / end for end in ends] == pytest.approx([4.0, 3.28], abs=0.01)


def test_a_short_closed_loop_is_measured_from_its_start() -> None:
    short = closed_loop([2.0] * 8, 2.0)
    short = replace(short, answers=[each for each in short.answers if each.arrival < 4.0])
    assert short.busy_from == 0.0
    assert (short.images_while_busy, short.busy_seconds) == (8, 2.0)


def test_the_newest_results_are_found(tmp_path: Path) -> None:
    assert newest("engine", tmp_path) is None
    for date in ("2026-11-24", "2026-11-23"):
        save(replace(RESULTS, date=date), tmp_path)
    found = newest("engine", tmp_path)
    assert found is not None
    assert found.date == "2026-11-24"


def test_goals_are_ratios_to_the_better_peer() -> None:
    by_name = {goal.name: goal for goal in goals(RESULTS)}
    short = by_name["p50 of 8 steps, against the better"]
    assert short.reached == pytest.approx(0.5)
    assert not short.met
    assert by_name["p95 of all, against the better"].met
    assert by_name["p95 of 40 steps, against one call at a time"].reached == pytest.approx(0.25)
    assert by_name["a lone request, against bare pipe()"].reached == pytest.approx(1.01)


def test_the_section_marks_a_missed_goal() -> None:
    page = section(RESULTS, "images")
    assert "| p50 of 8 steps, against the better | ≤ 0.45× | 0.50× | **no** |" in page
    assert "| (c) Darkroom's engine | 1.60 / 4.00 / 4.00 | 0.80 / 0.80 / 0.80 |" in page


def test_the_boundarys_section() -> None:
    figures = {"lone": [{"thread": 1.0, "process": 1.01}] * 5, "crossings": [0.001, 0.002, 0.003]}
    page = boundary.BENCHMARK.section(replace(RESULTS, figures=figures))
    assert "median ratio 1.010" in page
    assert "2000 µs at the median" in page


def test_the_exactness_section() -> None:
    equal = {"identical": 1.0, "lowest": None, "median": None, "largest_difference": 0}
    near = {"identical": 0.5, "lowest": 41.26, "median": 50.0, "largest_difference": 3}
    dtype = {
        "dtype": "float32",
        "widths": [{"images": 1, **equal}, {"images": 2, **near}],
        "again": equal,
        "exact": equal,
        "others": 3,
    }
    settings = {"images": 2, "steps": 20}
    page = exactness.BENCHMARK.section(
        replace(RESULTS, figures={"dtypes": [dtype]}, settings=settings)
    )
    assert "| 2 | 50% | 50.0 | 41.3 | 3 |" in page
    assert "| `exact`, among 3 others | 100% | ∞ | ∞ | 0 |" in page


def test_the_memory_section() -> None:
    seconds = {"float32": 4.0, "preset frugal": 2.0, "preset fast": 1.0, "preset tiny": 5.0}
    costs = [
        {"setting": name, "seconds": s, "allocated": 2.5e9, "reserved": 3e9, "device": 4e9}
        for name, s in seconds.items()
    ]
    settings = {"images": 3, "steps": 50}
    page = memory.BENCHMARK.section(replace(RESULTS, figures={"costs": costs}, settings=settings))
    assert (
        "| preset frugal | 2.00 | 2.00× | 2.50 | 3.00 | 4.00 | 0.99× | Stable Diffusion in" in page
    )
    assert "| fast's speed over frugal's | ≥ 1.3 | 2.00 | yes |" in page
    assert "| tiny's peak, GB | ≤ 1.7 | 2.50 | **no** |" in page


def test_a_section_is_replaced_and_handwritten_text_stays(tmp_path: Path) -> None:
    page = replace_section("# Title\n\nWords.\n", "one", "first")
    page = replace_section(page, "two", "second")
    page = replace_section(page, "one", r"third \1")
    assert "first" not in page
    assert page.index("Words.") < page.index(r"third \1") < page.index("second")
    path = write_section("new.md", "one", "text", tmp_path)
    assert path.read_text().startswith("# New\n")
