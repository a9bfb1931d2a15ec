"""An engine loop under test: real weights in memory, every event and every latent kept."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from darkroom_server.core.engine_config import Attention, Dtype, EngineConfig, ModelSource
from darkroom_server.core.events import (
    EngineReady,
    Event,
    ImageReady,
    JobCancelled,
    JobFailed,
    JobFinished,
    SampleProgress,
)
from darkroom_server.core.job import ImageFormat, Job, SchedulerName
from darkroom_server.engine.batching.row_limits import RowLimits
from darkroom_server.engine.families.stable_diffusion import StableDiffusionModel
from darkroom_server.engine.forms.toolchain import Toolchain
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.loop import EngineLoop
from darkroom_server.engine.sample import Sample
from darkroom_server.engine.warmup import measurement, placement, row_measurement

from .fake_cuda import FakeDevice, fake_cuda
from .tiny import SIZE, write_tiny_model

End = JobFinished | JobFailed | JobCancelled

MEASUREMENTS = tempfile.TemporaryDirectory(prefix="measurements-")
"""Each kind of model is measured once for all tests: that is most of the time of a start."""

MEASURED = ("test_measurement_cache", "test_row_tuning", "test_startup")
"""Files whose tests look at row limits and seconds that a start measured."""

FEW_ROWS = 10
"""The row limit of a family's loop: five guided images. Its first start measures such a batch."""


def make_job(id: str, **fields: Any) -> Job:
    """A job of the tiny model; ``fields`` replace what is usual."""
    usual: dict[str, Any] = {
        "id": id,
        "model": "tiny",
        "prompt": "a large yellow star on a blue background",
        "negative_prompt": "",
        "width": SIZE,
        "height": SIZE,
        "steps": 6,
        "guidance_scale": 5.0,
        "seed": 7,
        "image_count": 1,
        "scheduler": SchedulerName.DDIM,
        "format": ImageFormat.RAW_RGB,
        "quality": 90,
        "exact": False,
        "submitted_at": time.monotonic(),
    }
    return Job(**{**usual, **fields})


class LoopUnderTest:
    """Runs a loop on a thread and keeps its events; ``latents`` are the final ones."""

    def __init__(
        self, config: EngineConfig, toolchain: Toolchain | None = None, start_seconds: float = 180
    ) -> None:
        self.events: list[Event] = []
        self.ends: dict[str, End] = {}
        self.latents: dict[tuple[str, int], torch.Tensor] = {}
        self.on_event: Callable[[Event], None] = lambda _: None
        self.crash: BaseException | None = None
        self._changed = threading.Condition()
        self._started = threading.Event()
        self._config = config
        self._toolchain = toolchain
        self.loop: EngineLoop
        self.models: dict[str, StableDiffusionModel] = {}
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()
        assert self._started.wait(start_seconds)
        if self.crash is not None:
            raise self.crash

    def _run(self) -> None:
        try:
            self.loop, _ = start_loop(self._config, self._emit, self._toolchain)
            self.models = cast("dict[str, StableDiffusionModel]", self.loop._runner.models)
            decode = self.loop._decode

            def keep_latents(sample: Sample) -> None:
                self.latents[sample.job.id, sample.index] = sample.latents.clone()
                decode(sample)

            self.loop._decode = keep_latents  # type: ignore[method-assign]
        except BaseException as error:
            self.crash = error
            return
        finally:
            self._started.set()
        try:
            self.loop.run()
        except BaseException as error:
            with self._changed:
                self.crash = error
                self._changed.notify_all()

    def _emit(self, event: Event) -> None:
        self.on_event(event)
        with self._changed:
            self.events.append(event)
            if isinstance(event, End):
                assert event.job_id not in self.ends, "a job ended twice"
                self.ends[event.job_id] = event
            self._changed.notify_all()

    @property
    def row_limits(self) -> RowLimits:
        """The row limits of the model ``tiny``."""
        return self.loop._scheduler._row_limits["tiny"]

    def run(self, *jobs: Job) -> dict[str, End]:
        """Submit ``jobs`` and wait until each has ended."""
        for job in jobs:
            self.loop.submit(job)
        self.wait_for(lambda: all(job.id in self.ends for job in jobs))
        return {job.id: self.ends[job.id] for job in jobs}

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until ``condition``, looked at after each event, holds."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition() or bool(self.crash), timeout)
        if self.crash is not None:
            raise self.crash

    def image(self, job_id: str, index: int = 0) -> ImageReady:
        """The finished image ``index`` of a job."""
        return next(
            e
            for e in self.events
            if isinstance(e, ImageReady) and (e.job_id, e.image_index) == (job_id, index)
        )

    def progress(self, job_id: str) -> list[SampleProgress]:
        """The steps that a job took, in order."""
        return [e for e in self.events if isinstance(e, SampleProgress) and e.job_id == job_id]

    def close(self) -> None:
        self.loop.close()
        self._thread.join(60)
        assert not self._thread.is_alive()


def run_here(config: EngineConfig, *jobs: Job) -> tuple[EngineReady, list[Event]]:
    """Run ``jobs`` in a loop on this thread; returns its start and all its events."""
    events: list[Event] = []
    running = {job.id for job in jobs}

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, End):
            running.remove(event.job_id)
            if not running:
                loop.close()

    loop, ready = start_loop(config, emit)
    for job in jobs:
        loop.submit(job)
    loop.run()
    return ready, events


@pytest.fixture(scope="module", autouse=True)
def one_reading(request: pytest.FixtureRequest) -> Iterator[None]:
    """A start measures everything once, but in the files ``MEASURED``.

    Readings are repeated until they agree, which takes long on a busy machine, and few tests look
    at what was measured.
    """
    if request.path.stem in MEASURED:
        yield
        return

    def measure_rows(
        time_batch: row_measurement.TimeBatch, counts: Sequence[int]
    ) -> dict[int, float]:
        return row_measurement._lowest({rows: [time_batch(rows)] for rows in counts})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "measure_rows", measure_rows)
        for module in (measurement, placement):
            patch.setattr(module, "agreed_seconds", lambda read: read())
        yield


@pytest.fixture
def cuda() -> Iterator[FakeDevice]:
    """The make-believe CUDA device, for work on the test's own thread."""
    with fake_cuda() as device:
        yield device


def config_for(folder: Path, **fields: Any) -> EngineConfig:
    """Plain float32 on one thread: what diffusers does by itself."""
    usual: dict[str, Any] = {
        "models": (ModelSource(id="tiny", location=str(folder)),),
        "device": "cpu",
        "dtype": Dtype.FLOAT32,
        "attention": Attention.SDPA,
        "autocast": False,
        "channels_last": False,
        "threads": 1,
        "rows": 16,
        "measurement_cache": MEASUREMENTS.name,
    }
    return EngineConfig(**{**usual, **fields})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_loop(tiny_folder: Path) -> Iterator[LoopUnderTest]:
    """One loop for tests that leave it as they found it."""
    loop = LoopUnderTest(config_for(tiny_folder))
    yield loop
    loop.close()


@pytest.fixture
def own_loop(tiny_folder: Path) -> Iterator[LoopUnderTest]:
    """A loop of the test's own, to break."""
    loop = LoopUnderTest(config_for(tiny_folder))
    yield loop
    loop.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
