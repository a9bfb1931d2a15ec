"""The phases of the GPU benchmark in little: on the make-believe device, or on a CPU.

What needs a GPU runs the same phases there, as they are.
"""

import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from bench.gpu import correctness, memory_table
from bench.gpu.__main__ import phases_for
from bench.gpu.correctness import ALONE, WrongImages, compared
from bench.gpu.failing_engine import lose_device
from bench.gpu.faults import FaultNotContained, device_assert, out_of_memory
from bench.gpu.forms import decodes, forms, weights
from bench.gpu.machine import machine
from bench.gpu.phases import Figures, Phase, Plan, run_phases
from bench.gpu.serving import engine, load
from bench.inprocess import pipelines
from bench.inprocess.loop import Generated
from bench.micro import memory
from bench.report.results import newest
from bench.tiny_families import ONE_EACH
from bench.tiny_families.case import FamilyCase
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import Preset
from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.events import BatchDone, EngineReady
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.device.peak_memory import INTERVAL_SECONDS
from darkroom_server.engine.failures import is_fatal
from darkroom_server.engine.forms.toolchain import Inductor
from tests.bench.test_results import RESULTS
from tests.engine.conftest import MEASUREMENTS, cuda, one_thread
from tests.engine.fake_cuda import CudaMode, FakeDevice, Kind, fake_cuda
from tests.engine.test_weight_store import on_this_thread
from tests.engine.tiny import write_tiny_model

__all__ = ["cuda", "on_this_thread", "one_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")

SDXL = next(case for case in ONE_EACH if case.name == "SDXL")
SLOW = pytest.mark.slow
SHORT = replace(SDXL, jobs=[{**SDXL.jobs[0], "steps": 2}])


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """As little as shows that a phase runs."""
    folder = str(write_tiny_model(tmp_path_factory.mktemp("tiny")))
    return Plan(
        device="cuda",
        sd14=folder,
        demo=folder,
        schedulers=(SchedulerName.DDIM, SchedulerName.EULER_ANCESTRAL),
        families=(SHORT,),
        batch_rows=4,
        threads=1,
        measurements=MEASUREMENTS.name,
        rows=(2, 4),
        forms=("SDPA", "sliced, autocast"),
        repeats=1,
        side=8,
        copied_bytes=64,
        spare_bytes=4096,
        closed=18,
        arrivals=4,
        pairs=2,
        lone=2,
        long_steps=3,
        images=1,
    )


@pytest.fixture
def on_cpu(plan: Plan) -> Plan:
    return replace(plan, device="cpu")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "STEPS", 2)


def found(figures: Iterator[Figures]) -> Figures:
    """All that a phase yields."""
    together: Figures = {}
    for each in figures:
        together |= each
    return together


# ---- what the machine can do ----


def test_ceilings(plan: Plan, cuda: FakeDevice) -> None:
    figures = found(machine(plan))
    assert figures["device"] == "Fake GPU"
    assert figures["total_bytes"] == cuda.total_bytes
    ceilings = [name for name in figures if name.endswith(("second", "tflops", "microseconds"))]
    assert len(ceilings) == 4
    assert all(figures[name] > 0 for name in ceilings)
    assert cuda.kernels["add_"] >= 2000
    pinned = [each for each in cuda.traffic if each.kind is Kind.TO_DEVICE]
    assert pinned
    assert not any(each.blocking for each in pinned), "the copies are from pinned memory"


# ---- the same images ----


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("preset", [Preset.MAX, pytest.param(Preset.FRUGAL, marks=SLOW)])
def test_a_preset_makes_the_images_of_the_cpu(preset: Preset, plan: Plan, cuda: FakeDevice) -> None:
    figures = found(correctness.preset(preset, plan))
    assert figures["runtime"]["device"] == "cuda:0"
    assert figures["runtime"]["preset"] == preset
    assert figures["jobs"].keys() == {"ddim", "euler_ancestral"}
    assert figures["apart"] > 0
    assert all(0 < job["cpu"] < 0.25 for job in figures["jobs"].values()), "float16, rounded"
    assert figures["wrong"] == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=SLOW)])
def test_a_family_makes_the_images_of_the_cpu(device: str, plan: Plan) -> None:
    with fake_cuda() if device == "cuda" else nullcontext():
        (figures,) = found(correctness.families(replace(plan, device=device)))["families"].values()
    assert figures["half"] in ("float16", "bfloat16", "float32")
    assert (figures["half"] == "float16") == (device == "cuda")
    assert len(figures["jobs"]) == 3
    assert all(job["cpu"] < 0.01 for job in figures["jobs"].values())


def test_a_family_that_fails_does_not_stop_the_others(on_cpu: Plan) -> None:
    def broken(_: Path) -> Path:
        raise ValueError("no such part")

    names = ("one", "two")
    cases = tuple(replace(SDXL, name=name, write=broken) for name in names)
    figures = correctness.families(replace(on_cpu, families=cases))
    seen: list[list[str]] = []
    with pytest.raises(WrongImages, match="one: no such part; two: no such part"):
        seen.extend(list(each["families"]) for each in figures)
    assert seen == [["one"], ["one", "two"]]


def picture(level: int) -> Any:
    return np.full((2, 2, 3), level, np.uint8)


SHARED = BatchDone(model="m", width=2, height=2, rows=4, seconds=1.0, samples=2)


def made(a: Any, b: Any, alone_b: Any, **rest: Any) -> Generated:
    images = {"a": a, "b": b, f"{ALONE}a": picture(0), f"{ALONE}b": alone_b}
    return Generated(EngineReady((), 0.0), images, **{"events": [SHARED], **rest})


def test_images_are_judged_by_how_far_those_of_other_jobs_are() -> None:
    on_cpu = Generated(EngineReady((), 0.0), {"a": picture(0), "b": picture(100)})
    figures = compared(made(picture(10), picture(100), picture(100)), on_cpu)
    assert figures["apart"] == 100
    assert figures["jobs"]["a"] == {"cpu": 0.1, "alone": 0.1}
    assert figures["wrong"] == []
    swapped = compared(made(picture(100), picture(0), picture(0)), on_cpu)
    assert swapped["wrong"] == [
        *("a is off by 1.00 beside cpu", "a is off by 1.00 beside alone"),
        "b is off by 1.00 beside cpu",
    ]
    in_company = compared(made(picture(0), picture(100), picture(60)), on_cpu)
    assert in_company["wrong"] == ["b is off by 0.40 beside alone"]
    not_shared = compared(made(picture(0), picture(100), picture(100), events=[]), on_cpu)
    assert not_shared["wrong"] == ["no batch was shared"]
    same = Generated(EngineReady((), 0.0), {"a": picture(0), "b": picture(0)})
    alike = compared(made(picture(0), picture(0), picture(0)), same)
    assert alike["wrong"] == ["all images are alike"]
    failures = {"b": Failure(Reason.OUT_OF_MEMORY, "too large")}
    failed = compared(made(picture(0), None, None, failures=failures), on_cpu)
    assert failed["wrong"] == ["b: too large"]
    without = replace(on_cpu, failures=failures)
    on_neither = compared(made(picture(0), picture(100), picture(100)), without)
    assert on_neither["wrong"] == ["b on the CPU: too large"]


# ---- forms, decodes, memory ----


def test_forms_and_decodes(on_cpu: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "allowed_threads", lambda: 1)
    assert found(weights(on_cpu)) == {"written": True}
    steps = found(forms(on_cpu))["steps"]
    assert [(step["form"], step["rows"]) for step in steps] == [
        *(("SDPA", 2), ("SDPA", 4), ("sliced, autocast", 2), ("sliced, autocast", 4))
    ]
    figures = found(decodes(on_cpu))
    assert [each["images"] for each in figures["decode"]] == [1, 2, 4, 8]
    assert figures["encode"][0]["seconds"] > 0


@pytest.fixture
def engine_on_device(monkeypatch: pytest.MonkeyPatch, cuda: FakeDevice) -> FakeDevice:
    """An engine's thread works on the make-believe device too."""
    run = ThreadEngine._run

    def on_device(self: ThreadEngine) -> None:
        with torch.inference_mode(), CudaMode():  # type: ignore[no-untyped-call]
            run(self)

    monkeypatch.setattr(ThreadEngine, "_run", on_device)
    return cuda


def test_the_table_of_memory(
    plan: Plan, engine_on_device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = memory.SETTINGS["preset fast"]
    names = ("float32", "preset frugal", "preset fast", "preset tiny")
    monkeypatch.setattr(memory, "SETTINGS", dict.fromkeys(names, fast))
    monkeypatch.setattr(memory, "REQUEST", replace(memory.REQUEST, steps=2))
    # A measurement changes it for its whole process.
    monkeypatch.setitem(INTERVAL_SECONDS, "cuda", 1.0)
    measured: dict[str, Any] = {}

    def once(work: Any, setting: str, *rest: Any) -> Any:
        if not measured:
            measured["first"] = work(setting, *rest)
        cost, facts = measured["first"]
        return replace(cost, setting=setting), facts

    monkeypatch.setattr(memory, "in_fresh_process", once)
    docs = tmp_path / "docs"
    figures = found(memory_table.memory(tmp_path, docs, "", plan))
    assert [cost["setting"] for cost in figures["costs"]] == list(names)
    assert 0 < figures["costs"][0]["allocated"] <= engine_on_device.peak_bytes
    results = newest("memory", tmp_path)
    assert results is not None
    assert results.machine.gpu == "Fake GPU"
    page = (docs / "benchmarks.md").read_text()
    assert "| preset frugal |" in page
    assert "Made by `make bench-gpu`" in page
    assert memory.BENCHMARK.section(results) in page, "also when all pages are written again"


# ---- the engine ----


def test_an_engine_alone_and_saturated(on_cpu: Plan) -> None:
    figures = found(engine(Preset.FAST, on_cpu))
    assert figures["denoiser"] == "eager"
    assert figures["lone"].keys() == {"3"}
    assert figures["lone"]["3"]["seconds"] > 0
    saturated = figures["saturated"]
    assert saturated["images"] == on_cpu.closed
    assert saturated["images_per_second"] > 0
    assert any(batch["rows"] > 2 for batch in saturated["batches"])
    assert figures["peak_bytes"] > 1 << 20


def test_an_engine_that_is_to_compile_first(
    on_cpu: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler, as a machine with a GPU may be, it is measured as it is."""
    monkeypatch.setattr(Inductor, "missing", lambda *_: "there is no C++ compiler")
    plan = replace(on_cpu, compiled=str(tmp_path))
    with structlog.testing.capture_logs() as logs:
        figures = found(engine(Preset.FAST, plan, compiled=True))
    assert figures["denoiser"] == "eager"
    assert figures["saturated"]["images"] == plan.closed
    assert [log["why"] for log in logs if log["event"] == "denoisers stay eager"] == [
        "there is no C++ compiler"
    ]


@pytest.fixture
def one_core() -> Iterator[None]:
    """For this process and those that it starts: threads that share cores spin for nothing."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_core")
def test_the_load_beside_pipe(on_cpu: Plan) -> None:
    figures = found(load(replace(on_cpu, closed=12)))
    assert figures["lone"]["3"][0].keys() == {"engine", "pipe"}
    assert {name: len(each) for name, each in figures["latencies"].items()} == {
        "static": 4,
        "engine": 4,
    }


# ---- faults ----


@pytest.mark.usefixtures("on_this_thread")
def test_what_does_not_fit_is_answered_and_the_next_image_is_right(plan: Plan) -> None:
    with fake_cuda(total_bytes=64 << 20) as device:
        figures = found(out_of_memory(plan))
        assert figures == {
            "job": "OUT_OF_MEMORY",
            "load": True,
            "same_image_after": True,
            "loaded_after": True,
        }
        assert device.emptied_caches


@pytest.mark.slow
@pytest.mark.usefixtures("on_this_thread")
def test_memory_that_is_not_short_is_noticed(plan: Plan) -> None:
    """The control of the test above."""
    with fake_cuda(total_bytes=64 << 20) as device:
        enough = replace(plan, spare_bytes=device.total_bytes)
        with pytest.raises(FaultNotContained, match="the large job failed for memory"):
            found(out_of_memory(enough))


def test_a_lost_device_is_fatal() -> None:
    with pytest.raises(torch.AcceleratorError) as caught:
        lose_device(torch.device("cpu"))
    assert is_fatal(caught.value)


@pytest.mark.slow
def test_an_engine_that_lost_its_device_is_replaced(on_cpu: Plan) -> None:
    figures = found(device_assert(on_cpu))
    assert figures["restarts"] == 1
    assert figures["replaced"]
    assert figures["same_image_after"]


# ---- in processes ----


def test_every_phase_can_be_sent_to_a_process(plan: Plan, tmp_path: Path) -> None:
    options = Namespace(results=tmp_path, docs=tmp_path, note="", forms=())
    for phase in phases_for(options):
        assert pickle.loads(pickle.dumps((phase.measure, plan)))[1] == plan
    assert pickle.loads(pickle.dumps(GPU)) == GPU


@pytest.mark.slow
def test_phases_in_processes_of_their_own(on_cpu: Plan) -> None:
    phases = [
        Phase(name="machine", seconds=40, measure=machine),
        Phase(name="decodes", seconds=40, measure=decodes),
        Phase(name="preset fast", seconds=40, measure=partial(correctness.preset, Preset.FAST)),
        Phase(name="engine fast", seconds=40, measure=partial(engine, Preset.FAST)),
    ]
    results = replace(RESULTS, figures={})
    saved: list[int] = []
    ok = run_phases(
        phases,
        on_cpu,
        results,
        budget=240,
        save=lambda found: saved.append(len(found.figures)),
    )
    assert ok, results.figures["phases"]
    assert results.figures["machine"]["launch_microseconds"] > 0
    assert results.figures["engine fast"]["saturated"]["images"] == on_cpu.closed
    assert len(saved) > 2 * len(phases)


# ---- on a GPU ----

GPU = Plan()


@pytest.mark.gpu
@pytest.mark.parametrize("preset", [each for each in Preset if each is not Preset.AUTO])
def test_every_scheduler_on_a_gpu(preset: Preset) -> None:
    assert len(found(correctness.preset(preset, GPU))["jobs"]) >= 14


@pytest.mark.gpu
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_family_on_a_gpu(case: FamilyCase) -> None:
    assert found(correctness.families(replace(GPU, families=(case,))))


@pytest.mark.gpu
def test_memory_ends_on_a_gpu() -> None:
    assert found(out_of_memory(GPU))["loaded_after"]


@pytest.mark.gpu
def test_a_kernel_fails_an_assertion_on_a_gpu() -> None:
    assert found(device_assert(GPU))["replaced"]
