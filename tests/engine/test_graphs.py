"""Graphs for a few numbers of rows: filled up, used again, shared by jobs that change.

A fake graph is a plain call that reads and writes the same memory each time.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from darkroom_server.core.engine_config import Preset
from darkroom_server.core.events import EngineReady, Event, ImageReady
from darkroom_server.core.job import Job
from darkroom_server.core.model_runtime import DenoiserForm
from darkroom_server.engine.catalogue.slices import SlicedWork
from darkroom_server.engine.forms import graphs
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.forms.graphs import (
    BUCKETS,
    CudaRecorder,
    Graph,
    GraphedDenoiser,
    Recorder,
    _recorded,
    buckets_up_to,
)
from darkroom_server.engine.forms.signature import Signature, kinds_of
from darkroom_server.engine.loading.startup import start_loop

from .conftest import End, make_job
from .fake_cuda import FakeDevice
from .quantized import difference
from .test_gpu_path import on_gpu


class FakeRecorder:
    """``recorded`` and ``replayed`` are numbers of rows. ``limit``: more do not fit the memory."""

    def __init__(self, *, limit: int = 64, stale: bool = False) -> None:
        self.limit, self.stale = limit, stale
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def record(self, call: Callable[[], torch.Tensor]) -> Graph:
        output = call()
        rows = len(output)
        if rows > self.limit:
            raise torch.OutOfMemoryError("no memory")
        self.recorded.append(rows)

        def replay() -> None:
            self.replayed.append(rows)
            output[:] = call().flip(0) if self.stale else call()

        return Graph(replay, output)


class Denoiser(torch.nn.Module):
    """Rows that do not know of each other, unless ``mixes``."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.mixes, self.full = mixes, False

    def forward(self, sample: Any, timestep: Any, **_: Any) -> tuple[torch.Tensor]:
        if self.full:
            self.full = False
            raise torch.OutOfMemoryError("no memory")
        found = self.layer(sample) * timestep.view(-1, 1, 1, 1)
        return (found + found.mean(0) if self.mixes else found,)


def call(rows: int, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=generator).to(device),
        "timestep": torch.rand(rows, generator=generator).to(device),
        "positions": torch.rand(5, 3, generator=generator).to(device),
        "return_dict": False,
    }


def forms_of(denoiser: Denoiser, rows: tuple[int, ...], device: str = "cpu") -> DenoiserForms:
    return DenoiserForms(
        denoiser=denoiser,
        dtype=torch.float32,
        signature=Signature(kinds_of(call(7), call(8)), torch.channels_last),
        inputs=partial(call, device=device),
        graph_rows=rows,
    )


def graphed(
    denoiser: Denoiser, recorder: FakeRecorder, rows: tuple[int, ...]
) -> tuple[DenoiserForms, GraphedDenoiser | None]:
    forms = forms_of(denoiser, rows)
    with torch.inference_mode():
        forms.other = found = _recorded("tiny", forms, recorder)
    return forms, found


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser()


def test_buckets() -> None:
    assert BUCKETS == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    assert buckets_up_to(13) == (1, 2, 3, 4, 6, 8, 12)
    assert buckets_up_to(64) == BUCKETS
    for rows in range(1, 33):
        filled = min(bucket for bucket in BUCKETS if bucket >= rows)
        assert filled - rows <= filled / 3


@torch.inference_mode()
def test_rows_are_filled_up_and_do_not_see_what_fills_them(denoiser: Denoiser) -> None:
    recorder = FakeRecorder()
    forms, found = graphed(denoiser, recorder, (2, 6, 8))
    assert found is not None
    assert recorder.recorded == [8, 6, 2], "the widest first"
    for rows, bucket in ((1, 2), (2, 2), (3, 6), (5, 6), (7, 8)):
        for buffer in found._buffers.values():
            if isinstance(buffer, torch.Tensor):
                buffer.fill_(float("nan"))
        given = call(rows, seed=rows)
        output = forms.run(given, [])[0]
        assert recorder.replayed[-1] == bucket
        assert output.shape == (rows, 4, 8, 8)
        torch.testing.assert_close(output, denoiser(**given)[0])


@torch.inference_mode()
def test_the_poison_is_seen_if_rows_know_of_each_other() -> None:
    """The control of the test above."""
    forms, found = graphed(Denoiser(mixes=True), FakeRecorder(), (6,))
    assert found is not None
    found._buffers["sample"].fill_(float("nan"))
    assert not forms.run(call(5), [])[0].isfinite().any()


@torch.inference_mode()
def test_an_output_is_not_overwritten_by_the_next_batch(denoiser: Denoiser) -> None:
    forms, _ = graphed(denoiser, FakeRecorder(), (2, 4))
    given = [call(rows, seed=i) for i, rows in enumerate((4, 2, 3, 4, 1))]
    outputs = [forms.run(each, [])[0] for each in given]
    for each, output in zip(given, outputs, strict=True):
        torch.testing.assert_close(output, denoiser(**each)[0])


@torch.inference_mode()
def check_replays(recorder: Recorder, device: str) -> None:
    """Graphs of several numbers of rows, in turn, give what the denoiser gives."""
    denoiser = Denoiser().to(device)
    forms = forms_of(denoiser, (2, 6, 8), device)
    forms.other = found = _recorded("tiny", forms, recorder)
    assert found is not None
    assert found.recorded_rows == [2, 6, 8]
    for rows in (8, 1, 5, 2, 7, 5):
        given, other = (call(rows, seed=seed, device=device) for seed in (rows, rows + 100))
        wanted = denoiser(**given)[0]
        torch.testing.assert_close(forms.run(given, [])[0], wanted, rtol=5e-3, atol=5e-3)
        assert not torch.allclose(denoiser(**other)[0], wanted, rtol=5e-3, atol=5e-3)


def test_replays_give_what_the_denoiser_gives() -> None:
    check_replays(FakeRecorder(), "cpu")


@pytest.mark.gpu
def test_replays_on_a_gpu_give_what_the_denoiser_gives() -> None:
    check_replays(CudaRecorder(), "cuda")


@torch.inference_mode()
def test_what_no_graph_takes_runs_eagerly(denoiser: Denoiser) -> None:
    recorder = FakeRecorder()
    forms, found = graphed(denoiser, recorder, (1, 2, 6))
    assert found is not None
    recorder.replayed.clear()
    wide = call(7)
    assert torch.equal(forms.run(wide, [])[0], denoiser(**wide)[0])
    large = {**call(2), "sample": torch.randn(2, 4, 16, 16)}
    assert torch.equal(forms.run(large, [])[0], denoiser(**large)[0])
    assert recorder.replayed == []
    # Those of an exact job are not filled up.
    assert [found.takes(rows, exact=True) for rows in (1, 2, 3, 6, 7)] == [
        *(True, True, False, True, False)
    ]
    assert [found.takes(rows, exact=False) for rows in (1, 3, 7)] == [True, True, False]


@pytest.mark.parametrize(("limit", "rows"), [(12, [1, 4, 12]), (3, [1]), (0, [])])
def test_without_memory_there_are_fewer_graphs(
    denoiser: Denoiser, limit: int, rows: list[int]
) -> None:
    with structlog.testing.capture_logs() as logs:
        _, found = graphed(denoiser, FakeRecorder(limit=limit), (1, 4, 12, 16))
    assert (found.recorded_rows if found else []) == rows
    dropped = [log["rows"] for log in logs if log["event"] == "no memory for the graph of a batch"]
    assert dropped == [each for each in (16, 12, 4, 1) if each > limit]


def test_a_graph_that_computes_something_else_is_not_used(denoiser: Denoiser) -> None:
    with structlog.testing.capture_logs() as logs:
        _, found = graphed(denoiser, FakeRecorder(stale=True), (2, 4))
    assert found is None
    (line,) = logs
    assert line["why"].startswith("its output is wrong")


class Lasting(FakeRecorder):
    """No memory is left for the eager call beside a graph of ``room`` rows or more."""

    def __init__(self, denoiser: Denoiser, room: int) -> None:
        super().__init__()
        self._denoiser, self._room = denoiser, room

    def record(self, call: Callable[[], torch.Tensor]) -> Graph:
        graph = super().record(call)
        self._denoiser.full = len(graph.output) >= self._room
        return graph


def test_a_graph_that_could_not_be_compared_is_not_used(denoiser: Denoiser) -> None:
    _, found = graphed(denoiser, Lasting(denoiser, room=6), (2, 6, 8))
    assert found is not None
    assert found.recorded_rows == [2]


def test_batches_run_between_two_graphs_of_a_load(denoiser: Denoiser) -> None:
    recorder = FakeRecorder()
    forms = forms_of(denoiser, (2, 4, 8))
    work = SlicedWork(lambda: _recorded("tiny", forms, recorder))
    done = []
    with torch.inference_mode():
        while not work.run():
            done.append(list(recorder.recorded))
    assert done == [[8], [8, 4], [8, 4, 2]]


class FakeCapture:
    """In place of ``torch.cuda``: what ``CudaRecorder`` calls. A capture may fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stream = "default"
        self.fails = False
        self.pools: list[int] = []
        for name in ("CUDAGraph", "current_stream", "graph", "graph_pool_handle"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(graphs, "_recording_stream", lambda _: self.current_stream())

    def current_stream(self) -> Any:
        return SimpleNamespace(device="cuda", wait_stream=lambda _: None, name=self.stream)

    def graph_pool_handle(self) -> int:
        return len(self.pools)

    class CUDAGraph:
        def replay(self) -> None: ...

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, getattr(stream, "name", "recording")
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def graph(self, _: Any, *, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As torch's, which leaves its stream the current one if the end of a capture fails."""
        self.pools.append(pool)
        before, self.stream = self.stream, "recording"
        yield
        if self.fails:
            raise torch.OutOfMemoryError("no memory")
        self.stream = before


def test_a_pool_is_used_while_a_graph_of_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, recorder = FakeCapture(monkeypatch), CudaRecorder()
    held = [recorder.record(lambda: torch.zeros(1)) for _ in range(3)]
    assert capture.pools == [0, 0, 0]
    held.clear()
    recorder.record(lambda: torch.zeros(1))
    assert capture.pools == [0, 0, 0, 3]


def test_after_a_failed_capture_there_is_a_new_pool_and_the_old_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture, recorder = FakeCapture(monkeypatch), CudaRecorder()
    capture.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(lambda: torch.zeros(1))
    assert capture.stream == "default"
    capture.fails = False
    recorder.record(lambda: torch.zeros(1))
    assert capture.pools == [0, 1]


@pytest.mark.gpu
def test_after_a_capture_that_failed_on_a_gpu_others_are_recorded() -> None:
    recorder, weights = CudaRecorder(), torch.rand(64, 64, device="cuda")

    def fails() -> torch.Tensor:
        weights @ weights  # torch warns of a capture without a kernel.
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no memory")
        return weights @ weights

    with torch.inference_mode():
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                recorder.record(fails)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        for _ in range(2):  # Also once the last graph of a pool is gone.
            graph = recorder.record(lambda: weights @ weights)
            graph.output.zero_()
            graph.replay()
            torch.testing.assert_close(graph.output, weights @ weights)
            del graph


# ---- in the engine, on the make-believe device ----


def generate(
    folder: Path, preset: Preset, recorder: FakeRecorder | None, *jobs: Job, **fields: Any
) -> tuple[EngineReady, dict[str, bytes]]:
    gc.collect()  # The memory of the engine before.
    images: dict[str, bytes] = {}
    running = {job.id for job in jobs}

    def emit(event: Event) -> None:
        if isinstance(event, ImageReady):
            images[event.job_id] = event.image.data
        if isinstance(event, End):
            running.remove(event.job_id)
            if not running:
                loop.close()

    recorders = CudaRecorder if recorder is None else lambda: recorder
    loop, ready = start_loop(on_gpu(folder, preset, **fields), emit, new_recorder=recorders)
    for job in jobs:
        loop.submit(job)
    loop.run()
    return ready, images


def with_graphs_and_eager(
    folder: Path, recorder: FakeRecorder | None
) -> list[tuple[EngineReady, dict[str, bytes]]]:
    """What two engines make of the same jobs."""
    jobs = [
        make_job("exact", exact=True, steps=4),
        make_job("unguided", guidance_scale=1.0, steps=6),
        make_job("guided", steps=8),
    ]
    found = [
        generate(folder, Preset.MAX, recorder, *jobs),
        generate(folder, Preset.FAST, None, *jobs),
    ]
    assert [ready.models[0].runtime.denoiser for ready, _ in found] == [
        DenoiserForm.GRAPHS,
        DenoiserForm.EAGER,
    ]
    return found


def test_an_engine_runs_graphs(tiny_folder: Path, cuda: FakeDevice) -> None:
    recorder = FakeRecorder()
    (ready, images), (plain, eager) = with_graphs_and_eager(tiny_folder, recorder)
    assert recorder.recorded == [4, 3, 2, 1]
    assert {2, 3} <= set(recorder.replayed[4:]), "alone, and three rows of two jobs"
    assert ready.loads[0].bytes_by_component["graphs"] > 0
    assert images == eager
    free = [each.models[0].memory.available_bytes for each in (ready, plain)]
    assert free[0] < free[1], "what graphs take is not available to batches"


@pytest.mark.gpu
def test_an_engine_runs_graphs_on_a_gpu(tiny_folder: Path) -> None:
    (_, images), (_, eager) = with_graphs_and_eager(tiny_folder, None)
    # Rows that fill up a batch may let libraries choose other kernels.
    assert all(difference(images[id], eager[id]) < 2 for id in eager)
    assert difference(eager["guided"], eager["unguided"]) > 2, "the control"


def test_what_cannot_be_recorded_stays_eager(tiny_folder: Path, cuda: FakeDevice) -> None:
    """The make-believe device has no graphs."""
    with structlog.testing.capture_logs() as logs:
        ready, images = generate(tiny_folder, Preset.MAX, None, make_job("a", steps=4))
    assert ready.models[0].runtime.denoiser is DenoiserForm.EAGER
    assert images["a"]
    assert "denoiser stays eager" in [log["event"] for log in logs]
