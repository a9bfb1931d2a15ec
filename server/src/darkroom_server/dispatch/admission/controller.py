"""Lets a job in, or says why not: its caller's share, the queue's limits, its deadline."""

import time

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import DeadlineExceeded
from darkroom_server.dispatch.admission.availability import QueueLimits
from darkroom_server.dispatch.admission.estimator import Estimator
from darkroom_server.dispatch.admission.quotas import Quotas
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.registry import JobRegistry


class AdmissionController:
    """Checks newcomers, and counts those that are let in by their callers.

    With ``early_refusal`` those are refused at once that cannot be expected to be finished by their
    deadline.
    """

    def __init__(
        self, fleet: EnginePool, roster: JobRegistry, limits: QueueLimits, *, early_refusal: bool
    ) -> None:
        self.limits = limits
        self.estimates = Estimator(fleet, roster)
        self._fleet = fleet
        self._roster = roster
        self._early_refusal = early_refusal
        self._quotas = Quotas()

    def let_in(self, accepted: ActiveJob, caller: Caller) -> None:
        """Note the newcomer's estimate, and count it for its caller.

        Raises ``DeadlineExceeded``, ``QuotaExceeded`` or ``QueueFull``.
        """
        job, now = accepted.job, time.monotonic()
        if job.deadline is not None and job.deadline <= now:
            raise DeadlineExceeded("the deadline passed before the request was accepted")
        self._quotas.check(caller, now)
        if self._fleet.choose(accepted) is None:
            waiting = [each.job for each in self._roster.waiting()]
            self.limits.check(job, waiting, self.estimates.retry_after)
        accepted.estimate = self.estimates.of(accepted)
        if self._early_refusal:
            self.estimates.check_deadline(job, accepted.estimate)
        self._quotas.accepted(job.caller)

    def ended(self, accepted: ActiveJob) -> None:
        """Count a job that was let in no longer."""
        self._quotas.ended(accepted.job.caller)
