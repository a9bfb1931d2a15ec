"""A job in the engine: its samples, the time of its stages, and its single end."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from darkroom_server.core.events import (
    EncodedImage,
    Event,
    ImageReady,
    JobFinished,
    JobStarted,
    PreviewReady,
    StageSeconds,
)
from darkroom_server.core.job import Job

if TYPE_CHECKING:
    from darkroom_server.engine.device.timer import Timer
    from darkroom_server.engine.sample import Sample


class ResidentJob:
    """One job in the engine.

    The loop's thread runs its samples, threads of the encode pool deliver its images. A lock makes
    sure that the job ends once, and that no event of it follows its end.
    """

    def __init__(self, job: Job, emit: Callable[[Event], None]) -> None:
        self.job = job
        self.samples: Sequence[Sample] = ()
        self._emit = emit
        self._lock = threading.Lock()
        self._ended = False
        self._delivered: set[int] = set()
        self._prompt_timer: Timer | None = None
        self._first_batch: float | None = None
        self._denoised = 0.0
        self._decoded = 0.0
        self._images_decoded = 0

    @property
    def engine_seconds(self) -> float:
        """Seconds of batches spent on this job; each batch is shared among its rows."""
        return sum(sample.engine_seconds for sample in self.samples)

    @property
    def ended(self) -> bool:
        """True once the job's last event was emitted."""
        return self._ended

    def prompt_encoded(self, samples: "Sequence[Sample]", timer: "Timer") -> None:
        """Record the job's samples, and the timer of its prompts."""
        self.samples = samples
        self._prompt_timer = timer

    def extend(self, deadline: float | None) -> None:
        """Replace the job's deadline, in ``time.monotonic`` seconds."""
        self.job = replace(self.job, deadline=deadline)
        for sample in self.samples:
            sample.job = self.job

    def begin_batch(self, now: float) -> None:
        """Record that a batch with a sample of this job begins; emit ``JobStarted`` if the first.

        Emitted before the batch runs, so that a crash can be attributed to its jobs.
        """
        if self._first_batch is None:
            self._first_batch = now
            self._emit(JobStarted(self.job.id))

    def denoised(self, now: float) -> None:
        """Record that one of the samples took its last step."""
        self._denoised = now

    def decoded(self, now: float) -> bool:
        """Record that one of the samples was decoded; True if it was the job's last."""
        self._decoded = now
        self._images_decoded += 1
        return self._images_decoded == len(self.job.image_indices)

    def end(self, event: Event) -> bool:
        """End the job and emit ``event``; False, and no event, if it has already ended."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
            self._emit(event)
            return True

    def preview(self, event: PreviewReady) -> None:
        """Emit a preview, unless its image or the job is already finished."""
        with self._lock:
            if not self._ended and event.image_index not in self._delivered:
                self._emit(event)

    def deliver(self, index: int, image: EncodedImage) -> bool:
        """Emit a finished image; True if it was the job's last, which ends the job."""
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
        """The critical path, cut at the job's milestones: the stages add up to its whole stay."""
        first_batch = self._first_batch or now
        encode_prompt = 0.0
        if self._prompt_timer is not None:
            encode_prompt = self._prompt_timer.seconds()
            # A GPU still encodes when the first batch is launched, and starts it afterwards.
            first_batch = max(first_batch, self._prompt_timer.began + encode_prompt)
        return StageSeconds(
            queue=max(0.0, first_batch - self.job.submitted_at - encode_prompt),
            encode_prompt=encode_prompt,
            denoise=self._denoised - first_batch,
            decode=self._decoded - self._denoised,
            encode_image=now - self._decoded,
        )
