"""Jobs that no call waits for: their summaries are recorded when they end."""

import asyncio
from contextlib import suppress

from darkroom_server.core.errors import DarkroomError
from darkroom_server.dispatch import ActiveJob
from darkroom_server.service.call_context import CallContext
from darkroom_server.service.request import GenerationRequest
from darkroom_server.service.summary import Summaries


class DetachedJobs:
    """Records one summary for each job that runs without a call."""

    def __init__(self, summaries: Summaries) -> None:
        self._summaries = summaries
        self._tasks: set[asyncio.Task[None]] = set()

    def record(
        self, request: GenerationRequest, call: CallContext, arrived: float, active: ActiveJob
    ) -> None:
        """Record the summary of ``active`` when it ends; ``call`` arrived at ``arrived``."""
        task = asyncio.create_task(self._record_when_done(request, call, arrived, active))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _record_when_done(
        self, request: GenerationRequest, call: CallContext, arrived: float, active: ActiveJob
    ) -> None:
        job = active.job
        with (
            suppress(DarkroomError),
            self._summaries.record(request, call, arrived, job.deadline) as summary,
        ):
            summary.images, summary.steps = job.image_count, job.steps
            summary.accepted(active)
            summary.finished(await active.result())
