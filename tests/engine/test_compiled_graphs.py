"""Graphs of compiled denoisers: for which rows, for which jobs, and what is left without them.

The toolchain and the graphs are fake ones, and the device is the make-believe one.
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from darkroom_server.core.engine_config import Compile, Preset
from darkroom_server.core.events import (
    DenoiserCompiled,
    EngineReady,
    Event,
    ImageReady,
    SampleProgress,
)
from darkroom_server.core.model_runtime import DenoiserForm
from darkroom_server.engine.device.memory import SAFETY_MARGIN, available_bytes
from darkroom_server.engine.forms.compiled import CompiledDenoiser
from darkroom_server.engine.forms.graphs import Graph, GraphedDenoiser, compiled_buckets
from darkroom_server.engine.forms.signature import Values
from darkroom_server.engine.forms.task import CompileTask
from darkroom_server.engine.forms.toolchain import Inductor
from darkroom_server.engine.loading.startup import start_loop

from .conftest import End, make_job
from .fake_cuda import CUDA, FakeDevice
from .test_compiled import FakeToolchain
from .test_gpu_path import on_gpu
from .test_graphs import Denoiser, FakeRecorder, call, graphed

POOL_BYTES = 1 << 20
"""Of a graph that is recorded, in its pool."""


class StaticToolchain(FakeToolchain):
    """What it loads takes the rows of its task."""

    def load(self, task: CompileTask, file: Path, denoiser: Any) -> CompiledDenoiser:
        assert task.rows is not None
        return CompiledDenoiser(super().load(task, file, denoiser).run, task.rows, task.rows)


class PooledRecorder(FakeRecorder):
    """Graphs take memory of a pool. ``most``: further ones do not fit."""

    def __init__(self, device: FakeDevice, most: int = 64) -> None:
        super().__init__()
        self._device, self._most = device, most

    def record(self, call: Any) -> Graph:
        if len(self.recorded) == self._most:
            raise torch.OutOfMemoryError("no memory")
        self._device.unused_graph_bytes += POOL_BYTES
        return super().record(call)


class Engine:
    """An engine on the make-believe device, with what it emitted; ``on_event`` gets each event."""

    def __init__(
        self,
        folder: Path,
        cache: Path,
        toolchain: StaticToolchain,
        recorder: FakeRecorder,
        when: Compile | None = None,
    ) -> None:
        gc.collect()  # The memory of the engine before.
        self.events: list[Event] = []
        self.images: dict[str, bytes] = {}
        self.running: set[str] = set()
        self.on_event: Callable[[Event], None] = lambda _: None
        self.toolchain, self.recorder = toolchain, recorder
        config = on_gpu(folder, Preset.MAX, compile=when, compile_cache=str(cache))
        with structlog.testing.capture_logs() as self.logs:
            self.loop, self.ready = start_loop(
                config, self._emit, toolchain, new_recorder=lambda: recorder
            )

    def run(self, *ids: str, **fields: Any) -> None:
        """Run until the jobs ``ids`` have ended; then the engine is closed."""
        for id in ids:
            self.submit(id, **fields)
        with structlog.testing.capture_logs() as logs:
            self.loop.run()
        self.logs += logs

    def submit(self, id: str, **fields: Any) -> None:
        self.running.add(id)
        self.loop.submit(make_job(id, **fields))

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, ImageReady):
            self.images[event.job_id] = event.image.data
        self.on_event(event)
        if isinstance(event, End):
            self.running.remove(event.job_id)
            if not self.running:
                self.loop.close()

    @property
    def warnings(self) -> list[dict[str, Any]]:
        return [dict(log) for log in self.logs if log["event"] == "denoiser stays eager"]


def form_of(ready: EngineReady) -> DenoiserForm:
    return ready.models[0].runtime.denoiser


@pytest.fixture
def toolchain() -> StaticToolchain:
    found = StaticToolchain()
    found.go.set()
    return found


def test_a_lone_image_and_the_widest_graph_are_compiled() -> None:
    assert compiled_buckets((1, 2, 3, 4, 6, 8)) == (2, 8)
    assert compiled_buckets((1, 2)) == (2,)
    assert compiled_buckets((1,)) == (1,)


@torch.inference_mode()
def test_all_but_exact_rows_run_the_compiled_graph() -> None:
    denoiser, recorder = Denoiser(), FakeRecorder()
    forms, found = graphed(denoiser, recorder, (2, 4))
    assert found is not None
    found.add_compiled(2, found.recorded_compiled(2, lambda values: (denoiser(**values)[0] * 3,)))
    given = call(2, seed=5)
    values = forms.signature.arranged(given)
    assert values is not None
    eager = denoiser(**given)[0]
    torch.testing.assert_close(found(values)[0], eager * 3)
    torch.testing.assert_close(found(values, exact=True)[0], eager)
    # One row is filled up to two, three to four.
    for rows, factor in ((1, 3), (3, 1)):
        given = call(rows, seed=rows)
        torch.testing.assert_close(forms.run(given, [])[0], denoiser(**given)[0] * factor)


def test_what_has_the_kernels_lives_as_long_as_their_graph() -> None:
    """torch unloads a package's kernels with the package."""

    class Package:
        def __call__(self, values: Values) -> tuple[torch.Tensor]:
            return (values["sample"] * 2,)

    class Forgetful(FakeRecorder):
        """As torch's recorder, which keeps no call."""

        def record(self, call: Any) -> Graph:
            return Graph(lambda: None, call())

    found = graphed(Denoiser(), FakeRecorder(), (2,))[1]
    assert found is not None
    found._recorder = Forgetful()
    package = Package()
    alive = weakref.ref(package)
    with torch.inference_mode():
        found.add_compiled(2, found.recorded_compiled(2, package))
    del package
    gc.collect()
    assert alive() is not None
    del found
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("missing", ["toolkit", "compiler", "header", ""])
def test_what_a_compile_for_cuda_needs_is_asked_for_first(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "include"
    here.mkdir()
    for file, part in (("cuda.h", "toolkit"), ("Python.h", "header")):
        if part != missing:
            (here / file).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(here)})
    known = {"g++"} if missing == "compiler" else {"g++", "gcc"}
    monkeypatch.setattr("shutil.which", lambda name: name if name in known else None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    why = Inductor().missing(CompileTask("", {}, 2, gpu=1))
    says = {"toolkit": "cuda.h", "compiler": "gcc", "header": "Python.h"}
    assert says[missing] in why if missing else why == ""
    assert Inductor().missing(CompileTask("", {})) == "", "on a CPU"


def test_what_has_no_graph_beside_it_is_not_compiled(
    tiny_folder: Path, tmp_path: Path, toolchain: StaticToolchain, cuda: FakeDevice
) -> None:
    """Memory for the graphs of three rows and fewer only."""
    engine = Engine(tiny_folder, tmp_path, toolchain, FakeRecorder(limit=3), Compile.BLOCKING)
    assert engine.recorder.recorded[:3] == [3, 2, 1]
    assert len(toolchain.compiled) == 1, "of two rows, not of four"
    assert engine.warnings == []
    assert form_of(engine.ready) is DenoiserForm.COMPILED_GRAPHS


def test_an_engine_runs_compiled_graphs(
    tiny_folder: Path, tmp_path: Path, toolchain: StaticToolchain, cuda: FakeDevice
) -> None:
    engine = Engine(tiny_folder, tmp_path, toolchain, FakeRecorder(), Compile.BLOCKING)
    assert form_of(engine.ready) is DenoiserForm.COMPILED_GRAPHS
    assert engine.recorder.recorded == [4, 3, 2, 1, 2, 4], "of the eager denoiser first"
    started = len(toolchain.rows)
    engine.run("plain")
    assert toolchain.rows[started:] == [2] * 6, "each replay of the graph"
    assert not engine.warnings

    # The next start finds both, and compiles nothing; exact images know nothing of it.
    again = StaticToolchain()
    cached = Engine(tiny_folder, tmp_path, again, FakeRecorder(), Compile.CACHED)
    assert form_of(cached.ready) is DenoiserForm.COMPILED_GRAPHS
    started = len(again.rows)
    cached.run("exact", exact=True)
    assert again.rows[started:] == []
    assert again.compiled == []
    eager = Engine(tiny_folder, tmp_path, StaticToolchain(), FakeRecorder(), Compile.OFF)
    assert form_of(eager.ready) is DenoiserForm.GRAPHS
    eager.run("exact", exact=True)
    assert cached.images["exact"] == eager.images["exact"]


def test_graphs_serve_until_the_compile_ends(
    tiny_folder: Path, tmp_path: Path, cuda: FakeDevice
) -> None:
    """``--preset max`` compiles in the background."""
    toolchain = StaticToolchain()
    engine = Engine(tiny_folder, tmp_path, toolchain, FakeRecorder())
    assert form_of(engine.ready) is DenoiserForm.GRAPHS
    used: list[Event] = []

    def on_event(event: Event) -> None:
        if isinstance(event, SampleProgress):
            toolchain.go.set()
        if isinstance(event, DenoiserCompiled):
            used.append(event)
            info = event.of(engine.ready.models[0])
            assert info.runtime.denoiser is DenoiserForm.COMPILED_GRAPHS
            if len(used) == 2:
                engine.submit("after")

    engine.on_event = on_event
    engine.run("meanwhile", steps=150)
    assert len(used) == 2
    # Both compiles are compared, recorded, and compared again; then they run the images.
    assert toolchain.rows.count(4) >= 2
    assert set(engine.images) == {"meanwhile", "after"}
    assert toolchain.rows[-6:] == [2] * 6


def test_a_compiled_graph_that_is_wrong_is_not_used(
    tiny_folder: Path, tmp_path: Path, cuda: FakeDevice
) -> None:
    toolchain = StaticToolchain(error=0.2)
    toolchain.go.set()
    engine = Engine(tiny_folder, tmp_path, toolchain, FakeRecorder(), Compile.BLOCKING)
    assert form_of(engine.ready) is DenoiserForm.GRAPHS
    assert [line["rows"] for line in engine.warnings] == [2, 4]
    assert all(line["why"].startswith("its output is wrong") for line in engine.warnings)
    assert not list(tmp_path.glob("*.pt2")), "what is of no use is not kept"
    engine.run("image")
    assert engine.images["image"]


def test_a_compiled_graph_that_does_not_fit_is_kept_on_disk(
    tiny_folder: Path, tmp_path: Path, toolchain: StaticToolchain, cuda: FakeDevice
) -> None:
    recorder = PooledRecorder(cuda, most=5)
    engine = Engine(tiny_folder, tmp_path, toolchain, recorder, Compile.BLOCKING)
    assert form_of(engine.ready) is DenoiserForm.COMPILED_GRAPHS, "one of the two fits"
    (line,) = engine.warnings
    assert line["rows"] == 4
    assert len(list(tmp_path.glob("*.pt2"))) == 2
    started = len(toolchain.rows)
    engine.run("two", image_count=2)
    assert toolchain.rows[started:] == []
    assert engine.images["two"]


def test_without_graphs_nothing_is_compiled(
    tiny_folder: Path, tmp_path: Path, toolchain: StaticToolchain, cuda: FakeDevice
) -> None:
    recorder = PooledRecorder(cuda, most=0)
    engine = Engine(tiny_folder, tmp_path, toolchain, recorder, Compile.BLOCKING)
    assert form_of(engine.ready) is DenoiserForm.EAGER
    assert toolchain.compiled == []
    engine.run("image")
    assert engine.images["image"]


def test_what_graphs_take_is_not_available_to_batches(
    tiny_folder: Path, tmp_path: Path, toolchain: StaticToolchain, cuda: FakeDevice
) -> None:
    free = available_bytes(CUDA)
    cuda.unused_bytes = POOL_BYTES
    assert available_bytes(CUDA) == free, "a batch can use it"
    cuda.unused_graph_bytes = POOL_BYTES
    assert free - available_bytes(CUDA) == pytest.approx(POOL_BYTES * (1 - SAFETY_MARGIN), abs=2)
    cuda.unused_bytes = cuda.unused_graph_bytes = 0

    left: dict[bool, int] = {}
    for pooled in (False, True):
        recorder = PooledRecorder(cuda) if pooled else FakeRecorder()
        engine = Engine(tiny_folder, tmp_path, toolchain, recorder, Compile.BLOCKING)
        left[pooled] = engine.ready.models[0].memory.available_bytes
        graphs = engine.ready.loads[0].bytes_by_component["graphs"]
        assert (graphs > 4 * POOL_BYTES * (1 - SAFETY_MARGIN) - 4) is pooled
        engine.run("image")
        del engine
    taken = 6 * POOL_BYTES * (1 - SAFETY_MARGIN)
    assert left[False] - left[True] == pytest.approx(taken, rel=0.01)


def test_another_form_is_never_asked_for_rows_without_a_graph() -> None:
    """The control of what the engine relies on when it records a compiled one."""
    _, found = graphed(Denoiser(), FakeRecorder(), (2,))
    assert isinstance(found, GraphedDenoiser)
    assert found.recorded_rows == [2]
    assert not found.takes(3, exact=False)
