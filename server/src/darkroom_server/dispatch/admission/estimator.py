"""When a job would start and finish, and whether its deadline can be met."""

import math
import time

from darkroom_server.core.errors import DeadlineExceeded, Reason
from darkroom_server.core.job import Job
from darkroom_server.core.order import order
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.estimation.calibration import Calibration
from darkroom_server.dispatch.estimation.remaining_work import RemainingWorkCache, megapixel_steps
from darkroom_server.dispatch.estimation.simulation import Forecast, forecast
from darkroom_server.dispatch.jobs.estimate import Estimate
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState
from darkroom_server.dispatch.jobs.registry import JobRegistry

IN_COMPANY = 1.5
"""How many times its estimate a job must have until its deadline where others are here too.

What comes later is more urgent now and then, and widens the passes. Accepted jobs that are not
finished in time are work for nothing: of 1.2 and 1.5, less of it was done in overload with this.
"""

ALONE = 0.8
"""The same for a job that would be alone: it gets the benefit of the doubt, and harms nobody.

Each such refusal halves it until a pass is seen again: what was measured while something else had
the machine must not keep the door shut for good.
"""

UNKNOWN_RETRY_SECONDS = 1.0
SHORTEST_RETRY_SECONDS = 0.25
LONGEST_RETRY_SECONDS = 60.0


class Estimator:
    """Foretells from the engines' speeds and loads, and from what waits."""

    def __init__(self, fleet: EnginePool, roster: JobRegistry) -> None:
        self._fleet = fleet
        self._roster = roster
        self._calibration = Calibration()
        self._works = RemainingWorkCache()
        self._passes = 0
        self._refusals = 0

    def of(self, accepted: ActiveJob) -> Estimate | None:
        """For a job that is here, or would be from now on; None while too little is known."""
        now = time.monotonic()
        told = self._forecast(accepted)
        id = accepted.job.id
        if told is None or id not in told.finishes:
            return None
        finish = told.finishes[id]
        start = min(told.starts.get(id, 0.0), finish)
        factor = self._calibration.factor(finish)
        return Estimate(
            made_at=now,
            queue_wait=start * factor,
            run_time=(finish - start) * factor,
            forecast=finish,
        )

    def record_actual(self, estimate: Estimate, seconds: float) -> None:
        """A job took so many seconds from its estimate on."""
        self._calibration.learn(estimate.forecast, seconds)

    def expired(self, accepted: ActiveJob) -> None:
        """A job was not finished by its deadline."""
        if (estimate := accepted.estimate) is not None:
            self._calibration.expired(estimate.forecast, time.monotonic() - estimate.made_at)

    def check_deadline(self, job: Job, estimate: Estimate | None) -> None:
        """Raise ``DeadlineExceeded`` where a newcomer cannot be expected to meet its deadline."""
        if job.deadline is None or estimate is None:
            return
        company = any(not accepted.ended for accepted in self._roster.all())
        left = job.deadline - estimate.made_at
        if estimate.total * (IN_COMPANY if company else self._alone()) <= left:
            return
        self._calibration.refused(estimate.forecast)
        if not company:
            self._refusals += 1
        # Who is alone may be let in with less than the estimate, as a try: nobody is advised to.
        needed = _rounded_up(estimate.total * (IN_COMPANY if company else 1.0))
        why = ", since others may come between," if company else ""
        raise DeadlineExceeded(
            f"the deadline is in {left:.2f} s, and this would take about {estimate.total:.2f} s, "
            f"{estimate.queue_wait:.2f} s of them waiting; give it at least {needed:.2f} s{why} or "
            "ask for fewer steps, fewer images or smaller ones",
            Reason.DEADLINE_UNREACHABLE,
            {
                "estimate_seconds": f"{estimate.total:.3f}",
                "queue_wait_seconds": f"{estimate.queue_wait:.3f}",
                "run_seconds": f"{estimate.run_time:.3f}",
                "remaining_seconds": f"{left:.3f}",
                "needed_seconds": f"{needed:.3f}",
            },
        )

    def _alone(self) -> float:
        passes = sum(slot.passes for slot in self._fleet.slots)
        if passes != self._passes:
            self._passes, self._refusals = passes, 0
        return ALONE / 2.0 ** min(self._refusals, 64)

    def retry_after(self, jobs: int, work: float) -> float:
        """Seconds until so many jobs, and so many megapixel-steps, have left the queue."""
        told = self._forecast()
        if told is None:
            return UNKNOWN_RETRY_SECONDS
        waiting = {accepted.job.id: accepted.job for accepted in self._roster.waiting()}
        # Without a queue, a place is free when a job is finished.
        leave = {id: told.joins[id] for id in waiting if id in told.joins} or told.finishes
        seconds = UNKNOWN_RETRY_SECONDS
        for id in sorted(leave, key=leave.__getitem__):
            seconds = leave[id]
            jobs -= 1
            work -= megapixel_steps(waiting[id]) if id in waiting else work
            if jobs <= 0 and work <= 0.0:
                break
        seconds *= self._calibration.factor(seconds)
        return min(max(seconds, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)

    def _forecast(self, newcomer: ActiveJob | None = None) -> Forecast | None:
        """The forecast for all that is here, and ``newcomer``; None where it would be a guess."""
        slots = [slot for slot in self._fleet.slots if slot.ready]
        waiting = {accepted.job.id: accepted for accepted in self._roster.waiting()}
        if newcomer is not None and newcomer.place is JobState.OUTSIDE:
            waiting[newcomer.job.id] = newcomer
        inside = [accepted.job for slot in slots for accepted in slot.jobs.values()]
        models = {job.model for job in inside} | {each.job.model for each in waiting.values()}
        if not slots or not all(slot.speed.knows(model) for slot in slots for model in models):
            return None
        in_order = [waiting[key.id[0]] for key in order(a.key() for a in waiting.values())]
        return forecast(
            [slot.load() for slot in slots],
            self._works.of(in_order, {}),
            self._fleet.max_resident_samples,
        )


def _rounded_up(seconds: float) -> float:
    """To a hundredth, so that who gives as much as was said has given enough."""
    return math.ceil(seconds * 100.0) / 100.0
