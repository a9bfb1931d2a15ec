"""The limits of the queue."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from darkroom_server.core.errors import QueueFull, TooLarge
from darkroom_server.core.job import Job
from darkroom_server.dispatch.estimation.remaining_work import megapixel_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait: a number of jobs, and of megapixel-steps together.

    ``input_bytes``: the most that the images of all jobs take, those in engines included.
    """

    jobs: int
    megapixel_steps: float = math.inf
    input_bytes: int = sys.maxsize

    def check(
        self, job: Job, waiting: Sequence[Job], retry_after: Callable[[int, float], float]
    ) -> None:
        """Raise ``QueueFull`` if ``job`` cannot wait behind ``waiting``.

        ``retry_after(jobs, megapixel_steps)``: seconds until that much has left the queue. A job
        that is larger than the limit may wait alone.
        """
        if len(waiting) >= self.jobs:
            raise QueueFull(
                f"{len(waiting)} jobs are waiting, and no more are taken",
                retry_after(len(waiting) - self.jobs + 1, 0.0),
            )
        work = sum(map(megapixel_steps, waiting))
        over = work + megapixel_steps(job) - self.megapixel_steps
        if waiting and over > 0:
            raise QueueFull(
                f"jobs of {work:.0f} megapixel-steps are waiting, of {self.megapixel_steps:g} that "
                f"may, and this one has {megapixel_steps(job):.1f}",
                retry_after(1, min(over, work)),
            )

    def check_inputs(
        self, input_bytes: int, held_bytes: int, retry_after: Callable[[int, float], float]
    ) -> None:
        """Raise an error if a job with that many bytes of images cannot be held beside the others.

        ``TooLarge`` if it never can, else ``QueueFull``.
        """
        if input_bytes > self.input_bytes:
            raise TooLarge(
                f"the images of this request take {input_bytes} bytes once they are decoded, and "
                f"the server holds {self.input_bytes}; send fewer or smaller ones",
                metadata={
                    "needed_bytes": str(input_bytes),
                    "available_bytes": str(self.input_bytes),
                },
            )
        if held_bytes + input_bytes > self.input_bytes:
            raise QueueFull(
                f"the images of accepted jobs take {held_bytes} bytes, of {self.input_bytes} that "
                f"they may, and those of this request {input_bytes}",
                retry_after(1, 0.0),
            )
