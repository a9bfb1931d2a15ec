"""A job inside the engine: its samples, where its time went, and its one end."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from darkroom_server.core.events import (
    EncodedImage,
    Event,
    ImageReady,
    JobFinished,
    PreviewReady,
    StageSeconds,
)
from darkroom_server.core.job import Job
from darkroom_server.engine.device.timer import Timer
from darkroom_server.engine.sample import Sample


class ResidentJob:
    """One job being developed.

    The loop's thread steps its samples, threads of the encoding pool deliver its images: the lock
    sees to it that the job ends once, and that nothing is told of it afterwards.
    """

    def __init__(self, job: Job, emit: Callable[[Event], None]) -> None:
        self.job = job
        self.samples: list[Sample] = []
        self._emit = emit
        self._lock = threading.Lock()
        self._ended = False
        self._delivered: set[int] = set()
        self._prompts: Timer | None = None
        self._first_pass: float | None = None
        self._denoised = 0.0
        self._decoded = 0.0
        self._images_decoded = 0

    @property
    def engine_seconds(self) -> float:
        """Seconds of passes spent on this job, each pass shared among its rows."""
        return sum(sample.engine_seconds for sample in self.samples)

    def prompt_encoded(self, watch: Timer) -> None:
        """Note what timed this job's prompts."""
        self._prompts = watch

    def extend(self, deadline: float | None) -> None:
        """The job has until ``deadline`` instead."""
        self.job = replace(self.job, deadline=deadline)
        for sample in self.samples:
            sample.job = self.job

    def pass_begins(self, now: float) -> bool:
        """Note that a pass begins with a sample of this job; True if it is the job's first."""
        if self._first_pass is not None:
            return False
        self._first_pass = now
        return True

    def denoised(self, now: float) -> None:
        """Note that one of the samples took its last step."""
        self._denoised = now

    def decoded(self, now: float) -> bool:
        """Note that one of the samples was decoded; True if it was the job's last."""
        self._decoded = now
        self._images_decoded += 1
        return self._images_decoded == len(self.job.image_indices)

    def end(self, event: Event) -> bool:
        """End the job with ``event``; False if it had ended already, and ``event`` is not told."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
            self._emit(event)
            return True

    def preview(self, event: PreviewReady) -> None:
        """Tell of a preview, unless it comes too late."""
        with self._lock:
            if not self._ended and event.image_index not in self._delivered:
                self._emit(event)

    def deliver(self, index: int, image: EncodedImage) -> bool:
        """Tell of a finished image; True if it was the job's last, which ends the job."""
        with self._lock:
            if self._ended:
                return False
            self._emit(ImageReady(job_id=self.job.id, image_index=index, image=image))
            self._delivered.add(index)
            if len(self._delivered) < len(self.job.image_indices):
                return False
            finished = JobFinished(self.job.id, self._stages(time.monotonic()))
            self._ended = True
            self._emit(finished)
            return True

    def _stages(self, now: float) -> StageSeconds:
        """The critical path, cut at the job's own milestones: the stages add up to its stay."""
        first_pass = self._first_pass or now
        encode_prompt = 0.0
        if self._prompts is not None:
            encode_prompt = self._prompts.seconds()
            # The first pass is launched while a GPU still encodes, and begins there afterwards.
            first_pass = max(first_pass, self._prompts.began + encode_prompt)
        return StageSeconds(
            queue=max(0.0, first_pass - self.job.submitted_at - encode_prompt),
            encode_prompt=encode_prompt,
            denoise=self._denoised - first_pass,
            decode=self._decoded - self._denoised,
            encode_image=now - self._decoded,
        )
