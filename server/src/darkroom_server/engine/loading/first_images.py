"""The first image of each model, before a caller waits for one.

A GPU's libraries load their kernels when they are first used, and torch's allocator gets its first
memory from the driver. Beside the jobs of other models, as when a model is loaded on demand, their
batches run between those of the first image.
"""

import time

import structlog

from darkroom_server.core.events import BatchDone, Event, JobCancelled, JobFailed, JobFinished
from darkroom_server.core.job import ImageFormat, Job, Task
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.catalogue.slices import pause
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.loading.load_model import LoadedModel
from darkroom_server.engine.loop import EngineLoop
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache

log = structlog.get_logger(__name__)

STEPS = 2


def generate_first_image(loaded: LoadedModel) -> None:
    """``generate_first_images`` for one model."""
    id = loaded.model.info.id
    generate_first_images({id: loaded.model}, {id: loaded.cache})


def generate_first_images(models: dict[str, Model], caches: dict[str, MeasurementCache]) -> None:
    """Run one job of each model through a loop of its own, and discard its events.

    It pauses after each batch. A job that fails is logged: requests of another size may succeed.
    Raises an error that means that the device is lost.
    """
    began = time.monotonic()
    jobs = [_job(id, model.info) for id, model in models.items() if _takes_text(model.info)]
    running = {job.id for job in jobs}

    def emit(event: Event) -> None:
        if isinstance(event, JobFailed):
            log.error("the first image failed", model=event.job_id, why=event.failure.message)
        if isinstance(event, JobFinished | JobFailed | JobCancelled):
            running.discard(event.job_id)
            if not running:
                loop.close()
        if isinstance(event, BatchDone):
            pause()

    if not jobs:
        return
    loop = EngineLoop(models, emit, caches)
    for job in jobs:
        loop.submit(job)
    loop.run()
    log.info("first images generated", seconds=round(time.monotonic() - began, 2))


def _takes_text(model: ModelInfo) -> bool:
    return Task.TEXT_TO_IMAGE in model.tasks


def _job(id: str, model: ModelInfo) -> Job:
    """An image of the default size, with a preview."""
    defaults = model.defaults
    offer = model.offer(defaults.scheduler)
    return Job(
        id=id,
        model=id,
        prompt="a photograph of a tree",
        negative_prompt="",
        width=defaults.width,
        height=defaults.height,
        steps=max(STEPS, offer.min_steps if offer else 0),
        guidance_scale=defaults.guidance_scale,
        true_cfg_scale=defaults.true_cfg_scale,
        max_sequence_length=defaults.max_sequence_length,
        seed=0,
        image_count=1,
        scheduler=defaults.scheduler,
        # The loop waits until it is encoded.
        format=ImageFormat.RAW_RGB,
        quality=defaults.quality,
        exact=False,
        submitted_at=time.monotonic(),
        preview_every=1,
    )
