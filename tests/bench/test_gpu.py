"""The frame of the GPU benchmark: forms, phases that fail or are skipped, the page."""

import copy
import itertools
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from bench.gpu import __main__ as command
from bench.gpu.forward import FORMS, decode_seconds, encode_seconds, pass_seconds
from bench.gpu.phases import Figures, Phase, Plan, run_phases
from bench.gpu.report import goals, section
from bench.inprocess.remote import ProcessFailed, yields_of_process
from bench.report.results import Results, load, save
from tests.bench.test_results import RESULTS
from tests.engine.tiny import write_tiny_model

IN_FORMS = ["eager", "SDPA", "channels last", "sliced, autocast"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False
    )


@pytest.mark.parametrize("form", IN_FORMS)
def test_a_form_runs_every_number_of_rows(pipeline: Any, form: str) -> None:
    seconds = pass_seconds(FORMS[form](pipeline.unet), (2, 4), repeats=2)
    assert list(seconds) == [2, 4]
    assert all(value > 0 for value in seconds.values())


def test_all_forms_give_the_same_output(pipeline: Any) -> None:
    outputs = []
    for form in IN_FORMS:
        torch.manual_seed(0)
        outputs.append(FORMS[form](copy.deepcopy(pipeline.unet))(2)()[0].float())
    *others, rounded = outputs[1:]
    for other in others:
        torch.testing.assert_close(other, outputs[0], rtol=1e-3, atol=1e-4)
    # Autocast computes in bfloat16.
    error = (rounded - outputs[0]).norm() / outputs[0].norm()
    assert 0 < error < 0.05


def test_row_counts_that_do_not_fit_are_omitted(pipeline: Any) -> None:
    def ready(rows: int) -> Any:
        if rows > 4:
            raise torch.OutOfMemoryError
        return lambda: None

    assert list(pass_seconds(ready, (2, 4, 8, 16), repeats=1)) == [2, 4]


def test_decodes_and_prompts_are_timed(pipeline: Any) -> None:
    assert decode_seconds(pipeline.vae, torch.randn(1, 4, 8, 8), repeats=2) > 0
    assert encode_seconds(pipeline.text_encoder, 2, repeats=2) > 0


# ---- phases ----


def here(phase: Phase, plan: Plan, seconds: float) -> Iterator[Figures]:
    return phase.measure(plan)


def phase(name: str, *figures: Figures, seconds: float = 1, fails: str = "") -> Phase:
    def measure(plan: Plan) -> Iterator[Figures]:
        yield from figures
        if fails:
            raise ValueError(fails)

    return Phase(name=name, seconds=seconds, measure=measure)


def empty_results() -> Results:
    return replace(RESULTS, bench="gpu", model={"id": "sd14"}, settings={}, figures={}, runs=[])


def test_what_a_phase_finds_is_saved_at_once_and_a_failure_is_recorded() -> None:
    saved: list[dict[str, Any]] = []
    phases = [
        phase("one", {"a": 1}, {"b": 2}),
        phase("two", {"c": 3}, fails="no more"),
        phase("three", {"d": 4}),
    ]
    results = empty_results()
    ok = run_phases(
        phases,
        Plan(),
        results,
        budget=60,
        save=lambda found: saved.append(copy.deepcopy(found.figures)),
        start=here,
    )
    assert not ok
    assert [set(figures) - {"phases"} for figures in saved] == [
        *([{"one"}] * 3),
        *([{"one", "two"}] * 2),
        *([{"one", "two", "three"}] * 2),
    ]
    assert [figures["one"] for figures in saved[:2]] == [{"a": 1}, {"a": 1, "b": 2}]
    assert results.figures["two"] == {"c": 3}
    notes = results.figures["phases"]
    assert {name: note["outcome"] for name, note in notes.items()} == {
        "one": "done",
        "two": "failed",
        "three": "done",
    }
    assert notes["two"]["why"] == "ValueError: no more"


def test_a_phase_that_takes_longer_than_remains_is_skipped() -> None:
    clock = itertools.count(0.0, 10.0)  # Each look at it comes ten seconds later.
    given: list[float] = []

    def start(phase: Phase, plan: Plan, seconds: float) -> Iterator[Figures]:
        given.append(seconds)
        return here(phase, plan, seconds)

    results = empty_results()
    phases = [phase("a", {}), phase("long", {}, seconds=50), phase("short", {}, seconds=20)]
    ok = run_phases(
        phases,
        Plan(),
        results,
        budget=70,
        save=lambda _: None,
        start=start,
        now=lambda: next(clock),
    )
    assert ok, "nothing failed"
    notes = results.figures["phases"]
    assert [notes[name]["outcome"] for name in ("a", "long", "short")] == [
        *("done", "skipped", "done")
    ]
    assert notes["long"]["why"] == "40 s remained, and it takes about 50"
    assert given == [3, 20], "three times what it takes, or what remains"


def test_a_resumed_run_does_what_is_not_done() -> None:
    results = empty_results()
    phases = [phase("a", {"n": 1}), phase("b", {"old": 1}, fails="once")]
    run = partial(run_phases, plan=Plan(), budget=60, save=lambda _: None, start=here)
    assert not run(phases, results=results)
    assert run([phase("a", {"n": 2}), phase("b", {"new": 1})], results=results)
    assert results.figures["a"] == {"n": 1}
    assert results.figures["b"] == {"new": 1}
    assert results.figures["phases"]["b"]["outcome"] == "done"


def test_a_phase_in_a_process_of_its_own() -> None:
    assert list(yields_of_process(iter, [1, 2], seconds=60)) == [1, 2]
    with pytest.raises(ProcessFailed, match="TypeError: 'int' object is not iterable"):
        list(yields_of_process(iter, 1, seconds=60))
    dies: Any = os._exit
    with pytest.raises(ProcessFailed, match="died with code 3"):
        list(yields_of_process(dies, 3, seconds=60))


def test_a_phase_that_does_not_end_is_stopped() -> None:
    began = time.monotonic()
    hangs: Any = time.sleep
    with pytest.raises(ProcessFailed, match="not done after 0 s, and stopped"):
        list(yields_of_process(hangs, 600, seconds=0.2))
    assert time.monotonic() - began < 60


# ---- the command ----


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a CUDA device; phases run in this process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "in_fresh_process", lambda _: "Fake GPU")
    monkeypatch.setattr(command, "run_phases", partial(run_phases, start=here))


def phases_of(*phases: Phase) -> Callable[[object], list[Phase]]:
    return lambda _: list(phases)


@pytest.mark.usefixtures("with_gpu")
def test_the_command_writes_results_and_page_and_says_whether_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    ceilings = phase("machine", {"matmul_tflops": 790.0})
    monkeypatch.setattr(command, "phases_for", phases_of(ceilings, phase("load", fails="broken")))
    with pytest.raises(SystemExit) as ended:
        command.main(output)
    assert ended.value.code == 1
    (file,) = (tmp_path / "results").glob("gpu-*-fake-gpu.json")
    assert load(file).figures["machine"] == {"matmul_tflops": 790.0}
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| load | failed | ValueError: broken |" in page
    monkeypatch.setattr(command, "phases_for", phases_of(ceilings, phase("load", {"lone": {}})))
    with pytest.raises(SystemExit) as ended:
        command.main([*output, "--resume", str(file)])
    assert ended.value.code == 0
    assert load(file).figures["phases"]["load"]["outcome"] == "done"
    assert "failed" not in (tmp_path / "docs" / "benchmarks.md").read_text()


def test_an_unknown_phase_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--phases", "engine slow"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "no phase 'engine slow'; there are 'machine', 'weights'" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_bench_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["bench-gpu needs a CUDA device; there is none"]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize(
    "other",
    [{"machine": replace(RESULTS.machine, gpu="Other GPU")}, {"versions": {"torch": "0"}}],
    ids=["machine", "versions"],
)
def test_results_of_another_machine_or_other_versions_are_not_resumed(
    other: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "phases_for", phases_of(phase("machine", {"n": 1})))
    output = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    with pytest.raises(SystemExit):
        command.main(output)
    (file,) = (tmp_path / "results").iterdir()
    elsewhere = save(replace(load(file), **other), tmp_path / "elsewhere")
    before = elsewhere.read_text()
    with pytest.raises(SystemExit) as ended:
        command.main([*output, "--resume", str(elsewhere)])
    assert ended.value.code == 2
    assert f"--resume: {elsewhere.name} is of bench gpu on" in capsys.readouterr().err
    assert elsewhere.read_text() == before


def usual_phases(*forms: str) -> list[Phase]:
    return command.phases_for(Namespace(results=Path(), docs=Path(), note="", forms=forms))


def test_what_is_right_and_the_goals_fit_in_the_budget() -> None:
    """What is left takes a second run, which resumes the first."""
    phases = usual_phases()
    seconds = list(itertools.accumulate(phase.seconds for phase in phases))
    fit = {p.name for p, at in zip(phases, seconds, strict=True) if at <= command.BUDGET_SECONDS}
    presets = {f"preset {name}" for name in ("frugal", "fast", "max", "tiny")}
    assert presets | {"engine fast", "engine max", "load", "forms", "families"} <= fit
    left = sum(p.seconds for p in phases if p.name not in fit)
    assert left <= command.BUDGET_SECONDS


def test_only_phases_of_the_chosen_forms_run() -> None:
    assert "compiled" not in {phase.name for phase in usual_phases("SDPA")}
    names = {phase.name for phase in usual_phases("compiled")}
    assert "compiled" in names
    assert "forms" not in names


# ---- the page ----


def note(outcome: str, why: str = "") -> dict[str, Any]:
    return {"outcome": outcome, "why": why, "seconds": 1.0}


def engine(lone: float, rate: float) -> Figures:
    return {
        "start_seconds": 9.5,
        "denoiser": "graphs",
        "lone": {"20": {"first": 1.0, "seconds": 0.2}, "50": {"first": 1.0, "seconds": lone}},
        "saturated": {"images_per_second": rate},
        "peak_bytes": 4_200_000_000,
    }


def results() -> Results:
    lone = [{"engine": 0.5, "pipe": 1.0}, {"engine": 0.5, "pipe": 1.0}]
    figures = {
        "phases": {"machine": note("done"), "compiled": note("skipped", "9 s remained")},
        "machine": {"matmul_tflops": 790.0, "launch_microseconds": 6.5},
        "preset fast": {"jobs": {"ddim": {"cpu": 0.031, "alone": 0.0}}, "wrong": []},
        "preset tiny": {"jobs": {}, "wrong": ["ddim: no"]},
        "families": {
            "families": {
                "SDXL": {
                    "jobs": {"a": {"cpu": 0.001, "alone": 0.002}, "b": {"cpu": 0.0, "alone": 0.0}},
                    "half": "float16",
                },
                "Sana": {"wrong": ["broken"]},
            }
        },
        "forms": {
            "steps": [
                {"form": "eager", "rows": 2, "seconds": 0.020},
                {"form": "eager", "rows": 4, "seconds": 0.030},
                {"form": "SDPA", "rows": 2, "seconds": 0.010},
            ]
        },
        "decodes": {
            "decode": [{"images": 1, "seconds": 0.040}],
            "encode": [{"prompts": 2, "seconds": 0.005}],
        },
        "engine fast": engine(lone=0.6, rate=5.0),
        "engine max": engine(lone=0.4, rate=4.0),
        "out of memory": {
            "job": "OUT_OF_MEMORY",
            "load": True,
            "same_image_after": True,
            "loaded_after": False,
        },
        "device assert": {"seconds": 7.0, "same_image_after": True},
        "load": {
            "lone": {"20": lone, "50": lone},
            "images_per_second": {"static": 4.0, "engine": 8.0},
            "load": 0.7,
            "latencies": {"static": [2.0, 4.0], "engine": [1.0, 2.0]},
        },
    }
    return replace(empty_results(), figures=figures)


def test_the_section_has_what_was_measured_and_says_what_was_not() -> None:
    page = section(results())
    for line in (
        "| compiled | skipped | 9 s remained |",
        "| launch of a kernel from Python, µs | 6.5 |",
        "| `ddim` | 3.1% / 0.0% | failed |",
        "| SDXL | 0.1% / 0.2% | float16 |",
        "| Sana | failed |  |",
        "| eager | 20.0 (10%) | 30.0 (13%) |",
        "| SDPA | 10.0 (20%) |  |",
        "| decode 1 at once | 40.0 |",
        "| `max` | graphs | 9.5 | 0.200 | 0.400 | 4.00 (40%) | 4.2 |",
        "| 20 steps | 0.500 | 1.000 | 0.500 |",
        "| (c) Darkroom's engine | 8.00 | 1.50 | 1.95 |",
    ):
        assert line in page, line
    assert "answered with `OUT_OF_MEMORY`" in page
    assert "once there is memory: **no**" in page


def test_a_section_without_any_figures() -> None:
    figures = {"phases": {"machine": note("failed", "no GPU")}}
    page = section(replace(empty_results(), figures=figures))
    assert "| machine | failed | no GPU |" in page
    assert "###" not in page


def test_an_error_of_several_lines_is_one_cell() -> None:
    figures = {"phases": {"load": note("failed", "CUDA error: a | b\n\n  Compile with it\n")}}
    page = section(replace(empty_results(), figures=figures))
    assert "| load | failed | CUDA error: a \\| b Compile with it |" in page.splitlines()


def test_goals() -> None:
    reached = {goal.name: goal for goal in goals(results())}
    lone = reached["a lone image of 50 steps, seconds, preset `max`"]
    assert (lone.reached, lone.bound, lone.met) == (0.4, 0.45, True)
    rate = reached["images/s of 50 steps, saturated, preset `fast`"]
    assert (rate.reached, rate.bound, rate.met) == (5.0, 4.7, True)
    tail = reached["p95 at 70 % load over static batches'"]
    assert tail.reached == pytest.approx(0.5)
    assert goals(replace(empty_results(), figures={"phases": {}})) == []
