"""Lets a job in, or says why not: its caller's share, the queue's limits, its deadline."""

import time

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import DeadlineExceeded
from darkroom_server.dispatch.accepted import AcceptedJob
from darkroom_server.dispatch.admission import QueueLimits
from darkroom_server.dispatch.estimates import Estimates
from darkroom_server.dispatch.fleet import Fleet
from darkroom_server.dispatch.quotas import Quotas
from darkroom_server.dispatch.roster import Roster


class Gate:
    """Checks newcomers, and counts those that are let in by their callers.

    With ``early_refusal`` those are refused at once that cannot be expected to be finished by their
    deadline.
    """

    def __init__(
        self, fleet: Fleet, roster: Roster, limits: QueueLimits, *, early_refusal: bool
    ) -> None:
        self.limits = limits
        self.estimates = Estimates(fleet, roster)
        self._fleet = fleet
        self._roster = roster
        self._early_refusal = early_refusal
        self._quotas = Quotas()

    def let_in(self, accepted: AcceptedJob, caller: Caller) -> None:
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

    def ended(self, accepted: AcceptedJob) -> None:
        """Count a job that was let in no longer."""
        self._quotas.ended(accepted.job.caller)
