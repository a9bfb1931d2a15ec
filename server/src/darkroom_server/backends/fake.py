"""An engine that generates flat colours on command: for tests, ours and those of SDK users."""

import hashlib
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from darkroom_server.backends.fake_model import (
    FakeResident,
    fake_description,
    fake_load,
    fake_model,
)
from darkroom_server.backends.fake_pixels import fake_preview, pixels_of
from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.catalog import ModelDescription
from darkroom_server.core.engine_config import AdapterSource, ModelSource
from darkroom_server.core.errors import Failure
from darkroom_server.core.events import (
    AdapterChecked,
    BatchDone,
    EncodedImage,
    EngineDied,
    EngineReady,
    Event,
    ImageReady,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobStarted,
    JobTaken,
    Replay,
    SampleProgress,
    StageSeconds,
)
from darkroom_server.core.file_stamps import stamp_or_none
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import (
    ModelInHost,
    ModelLoad,
    ModelLoaded,
    ModelNotLoaded,
    ModelsDescribed,
    ModelUnloaded,
)
from darkroom_server.core.record import embedded_record
from darkroom_server.engine.output.formats import encode_image, sha256_of

FLAGGED = "[flagged]"
"""A prompt with this text generates images that are withheld."""


class FakeEngine:
    """An ``Engine`` that runs batches when ``advance`` is called.

    In each batch every image takes one step. With ``auto`` a job runs to its end when it is
    submitted. With ``pass_seconds`` a thread runs a batch at that interval. ``load`` False keeps
    the engine loading until ``become_ready`` is called. With ``startup_error`` it dies instead of
    loading; with ``dies_after`` it dies at that many submitted jobs. ``on_submit`` and
    ``on_cancel`` are called with each job and cancelled id. Events are emitted on the thread that
    causes them. ``offered`` are the adapters that were offered after the start, by id.
    ``catalogue`` are models to load, each of ``weight_bytes``; with ``hold_loads`` a load waits for
    ``finish_load``, and a read into the host's memory for ``finish_read``. One whose model is in
    ``failing`` fails for that reason.
    """

    def __init__(
        self,
        models: Sequence[ModelInfo] = (),
        *,
        catalogue: Sequence[ModelInfo] = (),
        weight_bytes: int = 100,
        hold_loads: bool = False,
        auto: bool = False,
        pass_seconds: float | None = None,
        load: bool = True,
        startup_error: str | None = None,
        dies_after: int | None = None,
        on_submit: Callable[[Job], None] = lambda _: None,
        on_cancel: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.models = tuple(models) or (() if catalogue else (fake_model(),))
        self.failing: dict[str, str] = {}
        self.loading: list[str] = []
        self.reading: list[str] = []
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self._in_host: set[str] = set()
        self._at_start = self.models
        self._catalogue = {info.id: info for info in (*self.models, *catalogue)}
        self._weight_bytes = weight_bytes
        self._hold_loads = hold_loads
        self.offered: dict[str, AdapterSource] = {}
        self.closed = threading.Event()
        self._auto = auto
        self._pass_seconds = pass_seconds
        self._load = load
        self._startup_error = startup_error
        self._dies_after = dies_after
        self._submitted = 0
        self._on_submit = on_submit
        self._on_cancel = on_cancel
        self._emit: Callable[[Event], None] = lambda _: None
        self._residents: dict[str, FakeResident] = {}
        self._cancelled: set[str] = set()
        self._lock = threading.RLock()

    def start(self, emit: Callable[[Event], None]) -> None:
        """Load at once, unless configured otherwise."""
        self._emit = emit
        if self._startup_error is not None:
            emit(EngineDied(self._startup_error, fatal=True))
        elif self._load:
            self.become_ready()
        if self._pass_seconds is not None:
            threading.Thread(target=self._run, name="fake-engine", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Add ``job`` to the next batch."""
        with self._lock:
            model = next(model for model in self.models if model.id == job.model)
            resident = FakeResident(job, model, job.image_indices, model.rows_per_image(job))
            self._residents[job.id] = resident
            self._submitted += 1
            self._on_submit(job)
            if self._submitted == self._dies_after:
                self.die()
            if self._auto:
                self.advance(job.steps)

    def cancel(self, job_id: str) -> None:
        """Remove a job at the next step boundary."""
        with self._lock:
            self._on_cancel(job_id)
            if job_id in self._residents:
                self._cancelled.add(job_id)
            if self._auto:
                self.advance(0)

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Set the deadline, which nothing checks: no time passes between batches."""
        with self._lock:
            if resident := self._residents.get(job_id):
                resident.job = replace(resident.job, deadline=deadline)

    def check_adapter(self, source: AdapterSource) -> None:
        """An adapter fits every model that takes LoRAs, if its file holds nothing but "fits"."""
        takes = [model.id for model in self.models if "loras" in model.optional_fields]
        fits = Path(source.location).read_text() == "fits"
        self._emit(
            AdapterChecked(
                adapter=source.id,
                file=source.location,
                offers={id: AdapterOffer(id=source.id, rank=4, bytes=500) for id in takes if fits},
                reason="" if takes and fits else "its file does not say that it fits",
            )
        )

    def offer_adapter(self, source: AdapterSource) -> None:
        """Note that later jobs may use an adapter."""
        self.offered[source.id] = source

    def withdraw_adapter(self, id: str) -> None:
        """Note that only earlier jobs may use an adapter."""
        self.offered.pop(id, None)

    def load_model(self, id: str, *, keep: bool = False, host_only: bool = False) -> None:
        """Load a model of the catalogue; its host's memory is the device's."""
        with self._lock:
            (self.reading if host_only else self.loading).append(id)
            if not self._hold_loads:
                (self.finish_read if host_only else self.finish_load)()

    def unload_model(self, id: str, *, keep: bool = False) -> None:
        """Unload a model; with ``keep`` it counts as held by the host."""
        with self._lock:
            assert not any(resident.job.model == id for resident in self._residents.values())
            self.models = tuple(model for model in self.models if model.id != id)
            self._at_start = tuple(model for model in self._at_start if model.id != id)
            self.unloaded.append(id)
            (self._in_host.add if keep else self._in_host.discard)(id)
            self._emit(ModelUnloaded(model=id, host_bytes=self._weight_bytes if keep else 0))

    def describe_models(self, sources: Sequence[ModelSource]) -> None:
        """Add a ``fake_model`` for each; one whose id is in ``failing`` cannot be served."""
        new = [fake_model(source.id) for source in sources]
        self._catalogue |= {info.id: info for info in new}
        stamps = [stamp_or_none(Path(source.location)) for source in sources]
        self._emit(ModelsDescribed(tuple(map(self._description_of, new, stamps))))

    def forget_models(self, ids: Collection[str]) -> None:
        """Remove models of the catalogue."""
        for id in ids:
            self._catalogue.pop(id, None)

    def close(self) -> None:
        """Stop; jobs end without an event."""
        self.closed.set()

    # For tests.

    @property
    def jobs(self) -> list[Job]:
        """The jobs in the engine, in the order of arrival."""
        with self._lock:
            return [resident.job for resident in self._residents.values()]

    def become_ready(self) -> None:
        """Report that the models of the start are loaded."""
        self.models, self._in_host = self._at_start, set()
        ids = {model.id for model in self.models}
        rest = [info for info in self._catalogue.values() if info.id not in ids]
        loads = tuple(map(self._load_of, ids)) if rest else ()
        described = tuple(map(self._description_of, rest))
        self._emit(EngineReady(self.models, 0.0, loads=loads, descriptions=described))

    def _description_of(self, info: ModelInfo, stamp: str = "") -> ModelDescription:
        reason = self.failing.get(info.id, "") if stamp else ""
        return fake_description(info, self._weight_bytes, stamp, reason)

    def finish_load(self, free_bytes: int | None = None) -> None:
        """End the load that began first."""
        with self._lock:
            if self._fails(id := self.loading.pop(0)):
                return
            self.models = (*self.models, self._catalogue[id])
            self.loaded.append(id)
            self._emit(
                ModelLoaded(info=self._catalogue[id], load=self._load_of(id), free_bytes=free_bytes)
            )

    def finish_read(self, host_bytes: int | None = None) -> None:
        """End the read into the host's memory, which holds the model or ``host_bytes`` of it."""
        with self._lock:
            if not self._fails(id := self.reading.pop(0)):
                kept = self._weight_bytes if host_bytes is None else host_bytes
                load = replace(self._load_of(id), host_bytes=kept)
                self._in_host |= {id} if kept else set()
                self._emit(ModelInHost(load=load))

    def _fails(self, id: str) -> bool:
        unknown = "" if id in self._catalogue else "the fake engine has no such model"
        if reason := self.failing.get(id, unknown):
            self._emit(ModelNotLoaded(model=id, reason=reason))
        return bool(reason)

    def _load_of(self, id: str) -> ModelLoad:
        return fake_load(id, self._weight_bytes, in_host=id in self._in_host)

    def advance(self, batches: int = 1) -> None:
        """Remove cancelled jobs, and run ``batches`` batches."""
        with self._lock:
            self._remove_cancelled()
            for _ in range(batches):
                self._run_batch()
                self._remove_cancelled()

    def take_newcomers(self) -> None:
        """Begin to encode the prompts of the jobs that are new since the last batch."""
        with self._lock:
            for job_id, resident in self._residents.items():
                if not resident.encoded:
                    resident.encoded = True
                    self._emit(JobTaken(job_id))

    def finish(self, job_id: str) -> None:
        """Run one job alone to its end."""
        with self._lock:
            self._finish(self._residents[job_id])

    def deliver(self, job_id: str, index: int) -> None:
        """Emit one image of a job that continues."""
        with self._lock:
            resident = self._residents[job_id]
            image = fake_image(resident.job, index, resident.model, resident.rows)
            self._emit(ImageReady(job_id=job_id, image_index=index, image=image))

    def fail(self, job_id: str, failure: Failure) -> None:
        """Fail a job."""
        with self._lock:
            del self._residents[job_id]
            self._emit(JobFailed(job_id, failure))

    def expire(self, job_id: str) -> None:
        """Remove a job as if its deadline had passed."""
        with self._lock:
            del self._residents[job_id]
            self._emit(JobCancelled(job_id, expired=True, wasted_seconds=0.0))

    def die(self, message: str = "the fake engine was made to die", *, fatal: bool = False) -> None:
        """Die with every job in it; ``start`` starts it again, empty."""
        with self._lock:
            self._residents.clear()
            self._cancelled.clear()
            self.loading.clear()
            self.reading.clear()
            self._emit(EngineDied(message, fatal))

    def _run(self) -> None:
        while not self.closed.wait(self._pass_seconds):
            self.advance()

    def _remove_cancelled(self) -> None:
        for job_id in self._cancelled & self._residents.keys():
            wasted = self._residents.pop(job_id).step * (self._pass_seconds or 0.0)
            self._emit(JobCancelled(job_id, expired=False, wasted_seconds=wasted))
        self._cancelled.clear()

    def _run_batch(self) -> None:
        residents = list(self._residents.values())
        if not residents:
            return
        rows = sum(resident.rows * len(resident.images) for resident in residents)
        seconds = self._pass_seconds or 0.0
        self.take_newcomers()
        for resident in residents:
            job = resident.job
            if resident.step == 0:
                self._emit(JobStarted(job.id))
            resident.step += 1
            for index in resident.images:
                self._emit(
                    SampleProgress(
                        job_id=job.id,
                        image_index=index,
                        step=resident.step,
                        steps=job.steps,
                        rows=rows,
                        seconds=seconds,
                    )
                )
                if job.preview_every and job.wants_preview(resident.step, job.steps):
                    colour = _colour(job.seed_of(index))
                    self._emit(fake_preview(job, index, resident.step, colour))
        first = residents[0].job
        self._emit(
            BatchDone(
                model=first.model,
                width=first.width,
                height=first.height,
                rows=rows,
                seconds=seconds,
                samples=sum(len(resident.images) for resident in residents),
                max_rows=self.models[0].limits.max_rows,
            )
        )
        for resident in residents:
            if resident.step >= resident.job.steps:
                self._finish(resident)

    def _finish(self, resident: FakeResident) -> None:
        job = resident.job
        for index in resident.images:
            image = fake_image(job, index, resident.model, resident.rows)
            self._emit(ImageReady(job_id=job.id, image_index=index, image=image))
        del self._residents[job.id]
        denoise = (self._pass_seconds or 0.0) * job.steps
        self._emit(JobFinished(job.id, StageSeconds(denoise=denoise)))


def fake_image(job: Job, index: int, model: ModelInfo, rows: int) -> EncodedImage:
    """Image ``index`` of ``job``, of ``rows`` rows: one flat colour, derived from its seed.

    With ``job.image``, the colour replaces the white part of its mask, or as much of all of it as
    ``strength`` says.
    """
    seed = job.seed_of(index)
    pixels = np.full((job.height, job.width, 3), _colour(seed), np.uint8)
    if job.image is not None:
        shown = pixels_of(job.image)
        part = pixels_of(job.mask_image) / 255 if job.mask_image is not None else job.strength
        pixels = np.round(shown * (1 - part) + pixels * part).astype(np.uint8)
    flagged = FLAGGED in job.prompt
    replay = Replay(
        scheduler_class="FakeScheduler",
        scheduler_config_json="{}",
        device="cpu",
        library_versions={"darkroom-server": "fake"},
        rows_in_last_pass=rows,
        pixels_sha256=sha256_of(pixels),
    )
    record = embedded_record(job, seed, model, replay) if job.embed_record else ""
    return EncodedImage(
        data=b"" if flagged else encode_image(pixels, job.format, job.quality, record),
        format=job.format,
        width=job.width,
        height=job.height,
        seed=seed,
        prompt_truncated=len(job.prompt.split()) > 75,
        flagged=flagged,
        replay=replay,
    )


def _colour(seed: int) -> list[int]:
    return list(hashlib.sha256(str(seed).encode()).digest()[:3])
