"""Darkroom's engine on the calling thread: jobs go in, and their images come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.errors import Failure
from darkroom_server.core.events import (
    EngineReady,
    Event,
    ImageReady,
    JobCancelled,
    JobFailed,
    JobFinished,
)
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.loading.startup import start_loop


@dataclass(frozen=True, slots=True)
class Generated:
    """What an engine made of some jobs.

    ``images`` has the pixels of each job's first image, [height, width, 3], by the job's id.
    """

    ready: EngineReady
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


def generate(config: EngineConfig, jobs_for: Callable[[ModelInfo], Sequence[Job]]) -> Generated:
    """Run the jobs for the one model of ``config`` until each has ended.

    Their images must be raw pixels. Raises what ends an engine: ``StartupError``, a lost device.
    """
    jobs: dict[str, Job] = {}
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, JobFinished | JobFailed | JobCancelled):
            running.discard(event.job_id)
            if not running:
                loop.close()

    loop, ready = start_loop(config, emit)
    jobs = {job.id: job for job in jobs_for(ready.models[0])}
    running = set(jobs)
    for job in jobs.values():
        loop.submit(job)
    loop.run()
    made = Generated(ready, events=events)
    for event in events:
        if isinstance(event, ImageReady) and event.image_index == 0:
            made.images[event.job_id] = pixels_of(event)
        elif isinstance(event, JobFailed):
            made.failures[event.job_id] = event.failure
    return made


def pixels_of(event: ImageReady) -> NDArray[np.uint8]:
    """The pixels of an image in ``ImageFormat.RAW_RGB``, [height, width, 3]."""
    image = event.image
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
