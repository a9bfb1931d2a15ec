"""Bounds the bytes that unfinished images hold between their batches. Knows no torch."""

import math
from collections.abc import Mapping

import structlog

from darkroom_server.core.events import Correction, SampleBytesCorrected
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.residency import HEADROOM, resident_bytes

log = structlog.get_logger(__name__)


class Residency:
    """The jobs in the engine, and what their unfinished images hold; ``models`` by id.

    A job enters if its images fit beside those that are here, or if nothing else is here: admission
    rejects jobs that do not fit alone. Used from the loop's thread only.
    """

    def __init__(self, models: Mapping[str, ModelInfo]) -> None:
        self.held_bytes = 0
        self._models = dict(models)
        self._jobs: dict[str, tuple[int, int]] = {}

    def set(self, model: ModelInfo) -> None:
        """``model`` is new, or has changed."""
        self._models[model.id] = model

    def remove(self, model_id: str) -> None:
        """A model that no job uses is gone."""
        self._models.pop(model_id, None)

    def has_room(self, job: Job) -> bool:
        """Whether the images of ``job`` may start now."""
        needed = len(job.image_indices) * self._bytes_per_image(job)
        if not needed or not self.held_bytes:
            return True
        return self.held_bytes + needed <= resident_bytes(self._models.values())

    def enter(self, job: Job) -> None:
        """The images of ``job`` start."""
        images, each = len(job.image_indices), self._bytes_per_image(job)
        self._jobs[job.id] = images, each
        self.held_bytes += images * each

    def finish_image(self, job_id: str) -> None:
        """An image of a job took its last step."""
        images, each = self._jobs[job_id]
        self._jobs[job_id] = images - 1, each
        self.held_bytes -= each

    def leave(self, job_id: str) -> None:
        """A job is removed; an unknown id is ignored."""
        images, each = self._jobs.pop(job_id, (0, 0))
        self.held_bytes -= images * each

    def correct(self, correction: Correction) -> None:
        """Follow what real batches changed."""
        self._models[correction.model] = correction.of(self._models[correction.model])

    def record(self, job: Job, held: int) -> SampleBytesCorrected | None:
        """Learn that an image of ``job`` holds ``held`` bytes; returns the correction, if any."""
        expected = self._bytes_per_image(job)
        if held <= expected:
            return None
        model = self._models[job.model]
        per_sample = math.ceil(HEADROOM * held / model.samples_per_image(job))
        correction = SampleBytesCorrected(job.model, per_sample)
        self.correct(correction)
        images, each = self._jobs[job.id]
        now = self._bytes_per_image(job)
        self._jobs[job.id] = images, now
        self.held_bytes += images * (now - each)
        log.info("bytes of an unfinished image corrected", model=job.model, bytes=per_sample)
        return correction

    def _bytes_per_image(self, job: Job) -> int:
        model = self._models.get(job.model)
        return model.held_bytes(job) if model else 0
