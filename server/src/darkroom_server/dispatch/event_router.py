"""The one place where the events of engines are matched."""

import time
from collections import deque

from darkroom_server.core.errors import GenerationFailed
from darkroom_server.core.events import (
    AdapterChecked,
    AdapterEvicted,
    AdapterLoaded,
    BatchDone,
    DecodeDone,
    DenoiserCompiled,
    EncodeDone,
    EngineDied,
    EngineReady,
    Event,
    ImageReady,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobStarted,
    JobTaken,
    MemoryReport,
    PreviewReady,
    RowLimitCorrected,
    SampleBytesCorrected,
    SampleProgress,
)
from darkroom_server.core.model_events import (
    ModelFetching,
    ModelInHost,
    ModelLoaded,
    ModelNotLoaded,
    ModelsDescribed,
    ModelUnloaded,
)
from darkroom_server.dispatch.adapter_catalog import AdapterCatalog
from darkroom_server.dispatch.adapters import AdapterKey
from darkroom_server.dispatch.admission.availability import Availability
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState
from darkroom_server.dispatch.lifecycle import JobLifecycle
from darkroom_server.dispatch.models.catalog import ModelCatalog
from darkroom_server.dispatch.observer import (
    AdapterMemory,
    EngineTimeWasted,
    FirstPreview,
    Observer,
)


class EventRouter:
    """Passes each event of an engine to the objects that it concerns.

    Events of jobs that the engine no longer has are ignored. Events that are not about one job go
    to the observer too, so that a new metric needs no change here.
    """

    def __init__(
        self,
        availability: Availability,
        pool: EnginePool,
        lifecycle: JobLifecycle,
        adapters: AdapterCatalog,
        models: ModelCatalog,
        observer: Observer,
    ) -> None:
        self._availability = availability
        self._pool = pool
        self._lifecycle = lifecycle
        self._adapters = adapters
        self._models = models
        self._observer = observer

    def route(self, engine: EngineHandle, events: deque[Event]) -> None:
        """Handle all ``events`` of ``engine``, oldest first, and remove them."""
        while events:
            event = events.popleft()
            match event:
                case SampleProgress():
                    if active := engine.jobs.get(event.job_id):
                        active.advance(event)
                case BatchDone():
                    engine.record_batch(event)
                    self._observer.on_event(event)
                case RowLimitCorrected() | SampleBytesCorrected() | DenoiserCompiled():
                    self._availability.correct(event)
                    engine.correct(event)
                    self._observer.on_event(event)
                case JobTaken():
                    if active := engine.jobs.get(event.job_id):
                        active.state = JobState.ENCODING
                case JobStarted():
                    if active := engine.jobs.get(event.job_id):
                        active.start()
                case PreviewReady():
                    if active := engine.jobs.get(event.job_id):
                        self._add_preview(active, event)
                case EncodeDone():
                    engine.batch_times.record_encode(event)
                    self._observer.on_event(event)
                case DecodeDone():
                    engine.batch_times.record_decode(event)
                case ImageReady():
                    if active := engine.jobs.get(event.job_id):
                        active.add_image(event.image_index, event.image)
                case JobFinished():
                    engine.healthy_since_crash = True
                    if active := engine.jobs.get(event.job_id):
                        engine.batch_times.record_job(active.job, event.stages)
                        self._lifecycle.finish(active, event.stages)
                case JobFailed():
                    if active := engine.jobs.get(event.job_id):
                        self._lifecycle.fail(active, GenerationFailed(event.failure))
                case JobCancelled():
                    if active := engine.jobs.get(event.job_id):
                        wasted = EngineTimeWasted(active.job.model, event.wasted_seconds)
                        self._observer.on_event(wasted)
                        self._lifecycle.engine_cancelled(active, expired=event.expired)
                case EngineReady():
                    self._on_ready(engine, event)
                case EngineDied():
                    self._on_death(engine, event)
                case AdapterChecked():
                    self._adapters.record_check(engine, event)
                case AdapterLoaded():
                    engine.adapters[event.model, event.adapter] = event.bytes
                    self._on_adapter(event)
                case AdapterEvicted():
                    engine.adapters.pop((event.model, event.adapter), None)
                    self._on_adapter(event)
                case ModelLoaded():
                    self._models.record_loaded(engine, event)
                    self._observer.on_event(event)
                    self._lifecycle.feed()
                case ModelInHost():
                    self._models.record_in_host(engine, event)
                    self._observer.on_event(event)
                    self._lifecycle.feed()
                case ModelNotLoaded():
                    if error := self._models.record_not_loaded(engine, event):
                        self._lifecycle.fail_waiting(event.model, error)
                    self._lifecycle.feed()
                case ModelUnloaded():
                    self._models.record_unloaded(engine, event)
                    self._observer.on_event(event)
                case ModelFetching():
                    self._models.record_fetching(event)
                case ModelsDescribed():
                    self._models.record_described(engine, event)
                case MemoryReport():
                    engine.memory = event
                    self._observer.on_event(event)
                case _:
                    self._observer.on_event(event)

    def _add_preview(self, active: ActiveJob, preview: PreviewReady) -> None:
        if active.add_preview(preview):
            seconds = time.monotonic() - active.job.submitted_at
            self._observer.on_event(FirstPreview(active.job.model, seconds))

    def _on_adapter(self, event: AdapterLoaded | AdapterEvicted) -> None:
        self._observer.on_event(event)
        self._report_memory((event.model, event.adapter))

    def _report_memory(self, key: AdapterKey) -> None:
        held = sum(engine.adapters.get(key, 0) for engine in self._pool.engines)
        self._observer.on_event(AdapterMemory(*key, held))

    def _on_ready(self, engine: EngineHandle, ready: EngineReady) -> None:
        engine.set_ready(ready)
        self._observer.on_event(ready)
        self._availability.describe(ready.descriptions)
        self._availability.set_loaded(ready.models)
        self._models.record_ready(engine, ready)
        self._lifecycle.feed()
        self._availability.report()

    def _on_death(self, engine: EngineHandle, died: EngineDied) -> None:
        self._adapters.record_death(engine)
        lost, engine.adapters = engine.adapters, {}
        for key in lost:
            self._report_memory(key)
        loads = self._models.record_death(engine)
        jobs = self._pool.handle_death(engine, died, by_load=bool(loads))
        if jobs is None:
            return
        for model, error in loads.items():
            if error is not None:
                self._lifecycle.fail_waiting(model, error)
        if self._pool.exhausted:
            self._availability.set_failed(self._pool.exhausted)
            self._lifecycle.no_engine_left()
        self._availability.report()
        self._models.report()
        self._lifecycle.engine_died(jobs, last=bool(self._pool.exhausted), by_load=bool(loads))
