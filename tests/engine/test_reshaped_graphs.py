"""Graphs of other sizes than the default, recorded once many batches of a size have come.

A fake graph is a plain call that reads and writes the same memory each time.
"""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from darkroom_server.core.engine_config import Preset
from darkroom_server.core.events import Event, ImageReady
from darkroom_server.core.model_events import ModelUnloaded
from darkroom_server.engine.device.memory import SAFETY_MARGIN
from darkroom_server.engine.forms import reshaped_graphs
from darkroom_server.engine.forms.reshaped_graphs import MOST_SHAPES, ReshapedGraphs
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.ipc.commands import UnloadModel

from .conftest import End, make_job
from .fake_cuda import FakeDevice
from .quantized import difference
from .test_adapted_graphs import Broken
from .test_gpu_path import on_gpu
from .test_graphs import Denoiser, FakeRecorder, call, forms_of, generate

USUAL = 4
"""Batches after which a graph is recorded here."""

EXACT = SimpleNamespace(job=SimpleNamespace(exact=True, active_loras=()))
ADAPTED = SimpleNamespace(job=SimpleNamespace(exact=False, active_loras=("a",)))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshaped_graphs, "RECORDED_AFTER", USUAL)


def sized(rows: int, side: int, seed: int) -> dict[str, Any]:
    """A call for images of another size, which has another number of positions too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        **call(rows, seed),
        "sample": torch.randn(rows, 4, side, side, generator=generator),
        "positions": torch.rand(side, 3, generator=generator),
    }


class Graphs:
    """A denoiser that may have graphs of 2, 4 and 8 rows; by default a sample has a side of 8."""

    def __init__(self, recorder: FakeRecorder | None = None) -> None:
        self.recorder = recorder or FakeRecorder()
        self.denoiser = Denoiser()
        self.forms = forms_of(self.denoiser, (2, 4, 8))
        # No graph at the default size: it takes nothing.
        self.forms.other = SimpleNamespace(takes=lambda *_, **__: False)
        graphs = ReshapedGraphs("tiny", self.forms, self.recorder)
        self.forms.reshaped = graphs.run

    def in_graph(self, rows: int, side: int, *samples: Any, seed: int = 1) -> bool:
        """Run a batch and compare its output; returns whether a graph made it."""
        recorded, replayed = len(self.recorder.recorded), len(self.recorder.replayed)
        with torch.inference_mode():
            given = sized(rows, side, seed)
            found, expected = self.forms.run(given, samples)[0], self.denoiser(**given)[0]
            self.forms.record_pending()
        torch.testing.assert_close(found, expected)
        # A batch after which a graph is recorded runs it only to compare it.
        compared = len(self.recorder.recorded) - recorded
        return len(self.recorder.replayed) - replayed > compared

    def become_usual(self, rows: int, side: int) -> None:
        for seed in range(USUAL):
            assert not self.in_graph(rows, side, seed=seed)


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


def test_a_usual_size_gets_a_graph_that_is_filled_up(graphs: Graphs) -> None:
    graphs.become_usual(3, side=12)
    assert graphs.recorder.recorded == [4]
    assert graphs.in_graph(3, 12)
    assert graphs.in_graph(4, 12)
    assert not graphs.in_graph(3, 16)
    graphs.become_usual(1, side=12)
    assert graphs.recorder.recorded == [4, 2]
    assert graphs.in_graph(1, 12)
    assert graphs.in_graph(2, 12)
    assert graphs.in_graph(3, 12)
    assert not graphs.in_graph(9, 12), "more rows than any graph has"


def test_the_default_size_is_not_counted(graphs: Graphs) -> None:
    with torch.inference_mode():
        for seed in range(USUAL * 2):
            graphs.forms.run(call(2, seed), [])
            graphs.forms.record_pending()
    assert graphs.recorder.recorded == []


def test_exact_rows_and_rows_with_adapters_run_eagerly(graphs: Graphs) -> None:
    graphs.become_usual(2, side=12)
    assert graphs.in_graph(2, 12)
    assert not graphs.in_graph(2, 12, EXACT, EXACT)
    assert not graphs.in_graph(2, 12, ADAPTED, ADAPTED)


def test_a_batch_of_exact_rows_does_not_count(graphs: Graphs) -> None:
    for _ in range(USUAL * 2):
        assert not graphs.in_graph(2, 12, EXACT, EXACT)
    assert graphs.recorder.recorded == []


def test_calls_of_another_kind_run_eagerly(graphs: Graphs) -> None:
    for other in (
        {"more": torch.rand(2)},
        {"sample": torch.rand(2, 4, 12)},
        {"return_dict": True},
        {"timestep": torch.rand(2, dtype=torch.float64)},
    ):
        for _ in range(USUAL):
            assert graphs.forms.reshaped is not None
            assert graphs.forms.reshaped({**sized(2, 12, 0), **other}) is None
    assert graphs.recorder.recorded == []


def test_a_few_sizes_have_graphs(graphs: Graphs) -> None:
    sides = [10 + 2 * n for n in range(MOST_SHAPES + 1)]
    for side in sides:
        graphs.become_usual(2, side)
    assert [graphs.in_graph(2, side) for side in sides] == [True] * MOST_SHAPES + [False]
    graphs.become_usual(4, sides[0])
    assert graphs.in_graph(4, sides[0])


def test_callers_of_many_sizes_do_not_make_memory_grow(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshaped_graphs, "MOST_COUNTED", 3)
    for side in (10, 12, 14):
        graphs.in_graph(2, side)
    for _ in range(USUAL - 2):
        graphs.in_graph(2, 10)
    graphs.in_graph(2, 16)  # All are counted from 0 again.
    graphs.become_usual(2, 10)
    assert graphs.recorder.recorded == [2]


@pytest.mark.parametrize(
    ("wrong", "why"), [(True, "its output is wrong"), (False, "no memory")], ids=["wrong", "memory"]
)
def test_after_a_failure_no_more_are_recorded(wrong: bool, why: str) -> None:
    recorder = Broken(wrong=wrong)
    graphs = Graphs(recorder)
    graphs.become_usual(2, 12)
    recorder.fails = True
    with structlog.testing.capture_logs() as logs:
        graphs.become_usual(2, 16)
        recorder.fails = False
        graphs.become_usual(4, 12)
    (line,) = logs
    assert line["event"] == "batches of other sizes stay eager"
    assert why in line["why"]
    # What computes something else once is not trusted any more.
    assert graphs.in_graph(2, 12) == (not wrong)
    assert not graphs.in_graph(2, 16)


def test_values_that_are_not_numbers_say_nothing_about_a_graph(graphs: Graphs) -> None:
    broken = sized(2, 12, 0)
    broken["sample"][:] = float("nan")
    with torch.inference_mode():
        for _ in range(USUAL):
            graphs.forms.run(broken, [])
            graphs.forms.record_pending()
    assert graphs.recorder.recorded == []
    graphs.become_usual(2, 12)
    assert graphs.in_graph(2, 12)


def test_an_engine_runs_graphs_of_another_size(tiny_folder: Path, cuda: FakeDevice) -> None:
    jobs = [make_job("small", steps=12, width=32, height=48)]
    jobs.append(make_job("exact", steps=6, width=32, height=48, exact=True))
    jobs.append(make_job("default", steps=4))
    recorder = FakeRecorder()
    _, found = generate(tiny_folder, Preset.MAX, recorder, *jobs)
    _, eager = generate(tiny_folder, Preset.FAST, None, *jobs)
    assert recorder.recorded[:4] == [4, 3, 2, 1]
    assert recorder.recorded[4:] == [2], "of the other size"
    assert found["exact"] == eager["exact"]
    for id in ("small", "default"):
        assert difference(found[id], eager[id]) < 1
    assert difference(eager["small"], eager["exact"]) > 2, "the control"


@pytest.mark.gpu
def test_an_engine_runs_graphs_of_another_size_on_a_gpu(tiny_folder: Path) -> None:
    job = make_job("small", steps=12, width=32, height=48)
    with structlog.testing.capture_logs() as logs:
        _, found = generate(tiny_folder, Preset.MAX, None, job)
    assert "graph of another size recorded" in [log["event"] for log in logs]
    _, eager = generate(tiny_folder, Preset.FAST, None, job)
    assert difference(found["small"], eager["small"]) < 2


def test_the_memory_of_graphs_is_taken_from_batches_and_given_back(
    tiny_folder: Path, cuda: FakeDevice
) -> None:
    gc.collect()  # The memory of the engine before.
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, ImageReady):
            left.append(loop._row_limits["tiny"].memory.available_bytes)
        if isinstance(event, End):
            loop.change_models(UnloadModel("tiny", keep=False))
        if isinstance(event, ModelUnloaded):
            loop.close()

    left: list[int] = []
    loop, ready = start_loop(on_gpu(tiny_folder, Preset.MAX), emit, new_recorder=FakeRecorder)
    loop.submit(make_job("small", steps=12, width=32, height=48))
    loop.run()
    (info,) = ready.models
    assert left[0] < info.memory.available_bytes
    (unloaded,) = [each for each in events if isinstance(each, ModelUnloaded)]
    held = sum(ready.loads[0].bytes_by_component.values())
    assert unloaded.free_bytes is not None
    assert ready.free_bytes is not None
    # Less the safety margin; the graphs are a fiftieth of what the model holds.
    assert unloaded.free_bytes - ready.free_bytes > 0.995 * (1 - SAFETY_MARGIN) * held
