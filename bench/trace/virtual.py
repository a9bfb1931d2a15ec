"""Virtual time: an event loop that does not wait, and an engine that takes its time in it."""

import asyncio
import selectors
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

from bench.trace.costs import LoadCosts
from darkroom_server.core.catalog import ModelDescription, WeightOrigin
from darkroom_server.core.engine_config import AdapterSource, ModelSource
from darkroom_server.core.events import (
    EncodedImage,
    EngineReady,
    Event,
    ImageReady,
    JobFinished,
    JobStarted,
    JobTaken,
    Replay,
    SampleProgress,
    StageSeconds,
)
from darkroom_server.core.job import ImageFormat, Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import (
    ModelInHost,
    ModelLoad,
    ModelLoaded,
    ModelUnloaded,
)
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.remaining_work import remaining_work
from darkroom_server.dispatch.estimation.simulation import Forecast, Load, SimulatedEngine
from darkroom_server.dispatch.jobs.job import ActiveJob

T = TypeVar("T")

IMAGE = EncodedImage(
    data=b"-",
    format=ImageFormat.PNG,
    width=0,
    height=0,
    seed=0,
    prompt_truncated=False,
    flagged=False,
    replay=Replay(
        scheduler_class="",
        scheduler_config_json="",
        device="",
        library_versions={},
        rows_in_last_pass=0,
        pixels_sha256="",
    ),
)
"""Stands for every image."""


STUCK_SECONDS = 10.0
"""The real time that another thread gets, when nothing else is to be done."""


class Clock(selectors.DefaultSelector):
    """Instead of waiting for the next timer, the clock advances to it."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def __call__(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; raises ``RuntimeError`` if nothing ever will be.

        Without a timer, it waits for another thread.
        """
        ready = super().select(0.0 if timeout is not None else STUCK_SECONDS)
        if not ready:
            if timeout is None:
                raise RuntimeError("nothing will ever happen again")
            self._now += timeout
        return ready


def run_virtually(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main`` to its end in an event loop with virtual time, which begins at 0."""
    clock = Clock()
    with patch.object(time, "monotonic", clock):
        runner = asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(clock))
        with runner:
            return runner.run(main())


class Entered(NamedTuple):
    """Seconds that a job waited for the engine, and of these the ones for its model."""

    waited: float
    for_model: float


class Lane(Enum):
    """What one load at a time uses: the disk, and the way to the device."""

    DISK = auto()
    DEVICE = auto()


class VirtualEngine:
    """An ``Engine`` whose batches and loads take virtual time; its jobs are never cancelled.

    ``catalogue`` are the models that it can load, each of ``weight_bytes``. ``costs`` says what
    loads cost. The host's memory is another one than the device's, and a read into it goes on
    beside the load of another model. It runs batches as the dispatcher's own simulation does.
    ``entered`` has every job that it got, by id.
    """

    def __init__(
        self, catalogue: Sequence[ModelInfo], costs: LoadCosts, *, weight_bytes: int = 1
    ) -> None:
        self.models = {info.id: info for info in catalogue}
        self.resident: set[str] = set()
        self.in_host: set[str] = set()
        self._costs = costs
        self._busy: set[Lane] = set()
        self._weight_bytes = weight_bytes
        self._emit: Callable[[Event], None] = lambda _: None
        self._jobs: dict[str, Job] = {}
        self._started: set[str] = set()
        self._loaded_at: dict[str, float] = {}
        self.entered: dict[str, Entered] = {}
        self._forecast = Forecast()
        times = BatchTimeModel()
        for info in catalogue:
            times.start(info)
        load = Load(batch_times=times, max_rows=self._max_rows, jobs=())
        self._engine = SimulatedEngine(load, self._forecast)
        self._timer: asyncio.TimerHandle | None = None

    def start(self, emit: Callable[[Event], None]) -> None:
        """Describe the catalogue; nothing is loaded."""
        self._emit = emit
        described = [
            ModelDescription(id=info.id, info=info, weight_bytes=self._weight_bytes)
            for info in self.models.values()
        ]
        free = sys.maxsize
        emit(EngineReady((), 0.0, descriptions=tuple(described), host_free_bytes=free))

    def submit(self, job: Job) -> None:
        """Add a job at the next step boundary."""
        assert job.model in self.resident
        work = remaining_work(ActiveJob(job, self.models[job.model]))
        now = time.monotonic()
        loaded = max(0.0, self._loaded_at[job.model] - job.submitted_at)
        self.entered[job.id] = Entered(now - job.submitted_at, loaded)
        self._jobs[job.id] = job
        self._engine.advance_to(now)
        self._engine.take(work)
        self._engine.choose_again()
        self._emit(JobTaken(job.id))
        self._report()
        self._schedule()

    def load_model(self, id: str, *, keep: bool = False, host_only: bool = False) -> None:
        """Load a model, or read it into the host's memory, for as long as ``costs`` says.

        The disk serves one of them at a time, and so does the way to the device.
        """
        in_host = id in self.in_host
        lanes = {Lane.DISK} if not in_host else set()
        lanes |= {Lane.DEVICE} if not host_only else set()
        assert not lanes & self._busy
        self._busy |= lanes
        seconds = self._costs.cost(in_host=in_host, host_only=host_only)
        self._costs.record(in_host=in_host, host_only=host_only)
        load = ModelLoad(
            model=id,
            load_seconds=seconds,
            warm_up_seconds=0.0,
            bytes_by_component={"unet": self._weight_bytes},
            origin=WeightOrigin.HOST if in_host else WeightOrigin.DISK,
            host_bytes=self._weight_bytes if keep else 0,
        )
        done = self._read if host_only else self._loaded
        asyncio.get_running_loop().call_later(seconds, done, load, lanes)

    def unload_model(self, id: str, *, keep: bool = False) -> None:
        """Unload a model that has no jobs; with ``keep`` the host's memory still holds it."""
        assert not any(job.model == id for job in self._jobs.values())
        self.resident.discard(id)
        if not keep:
            self.in_host.discard(id)
        kept = self._weight_bytes if id in self.in_host else 0
        self._emit(ModelUnloaded(model=id, host_bytes=kept))

    def close(self) -> None:
        """Run nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def cancel(self, job_id: str) -> None:
        """See the class."""
        raise NotImplementedError

    def extend(self, job_id: str, deadline: float | None) -> None:
        """See the class."""
        raise NotImplementedError

    def check_adapter(self, source: AdapterSource) -> None:
        """See the class."""
        raise NotImplementedError

    def offer_adapter(self, source: AdapterSource) -> None:
        """See the class."""
        raise NotImplementedError

    def withdraw_adapter(self, id: str) -> None:
        """See the class."""
        raise NotImplementedError

    def describe_models(self, sources: Sequence[ModelSource]) -> None:
        """See the class."""
        raise NotImplementedError

    def forget_models(self, ids: Collection[str]) -> None:
        """See the class."""
        raise NotImplementedError

    def _max_rows(self, group: Group) -> int:
        return self.models[group.model].rows_of_a_pass(group.width, group.height)

    def _read(self, load: ModelLoad, lanes: set[Lane]) -> None:
        self._busy -= lanes
        self.in_host.add(load.model)
        self._emit(ModelInHost(load=load))

    def _loaded(self, load: ModelLoad, lanes: set[Lane]) -> None:
        self._busy -= lanes
        id = load.model
        self.resident.add(id)
        if load.host_bytes:
            self.in_host.add(id)
        self._loaded_at[id] = time.monotonic()
        self._emit(ModelLoaded(info=self.models[id], load=load))

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._engine.busy:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._engine.next_at(), self._advance)

    def _advance(self) -> None:
        """The next images are finished."""
        self._timer = None
        self._engine.advance()
        self._engine.fill()
        loop = asyncio.get_running_loop()
        for id, at in self._forecast.finishes.items():
            loop.call_at(at, self._finish, id)
        self._forecast.finishes.clear()
        self._report()
        self._schedule()

    def _finish(self, id: str) -> None:
        job = self._jobs.pop(id)
        self._started.discard(id)
        del self._forecast.starts[id]
        for index in range(job.image_count):
            self._emit(ImageReady(job_id=id, image_index=index, image=IMAGE))
        self._emit(JobFinished(id, StageSeconds()))

    def _report(self) -> None:
        """The steps that each image has taken, for the dispatcher's estimates."""
        for id in self._forecast.starts.keys() - self._started:
            self._started.add(id)
            self._emit(JobStarted(id))
        remaining: defaultdict[str, list[int]] = defaultdict(list)
        for work, calls in self._engine.remaining():
            remaining[work.id].append(calls)
        for id, unfinished in remaining.items():
            job = self._jobs[id]
            finished = job.image_count - len(unfinished)
            for index, calls in enumerate((*unfinished, *[0] * finished)):
                if calls < job.steps:
                    self._emit(
                        SampleProgress(
                            job_id=id,
                            image_index=index,
                            step=job.steps - calls,
                            steps=job.steps,
                            rows=0,
                            seconds=0.0,
                        )
                    )
