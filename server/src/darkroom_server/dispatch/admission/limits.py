"""The limits of the queue."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from darkroom_server.core.errors import QueueFull
from darkroom_server.core.job import Job
from darkroom_server.dispatch.estimation.remaining_work import megapixel_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait: a number of jobs, and of megapixel-steps together."""

    jobs: int
    megapixel_steps: float = math.inf

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
