"""The way of accepted jobs: into the queue, to an engine, and to their one end."""

import asyncio
import time
from dataclasses import replace

from darkroom_server.core.errors import DarkroomError
from darkroom_server.core.events import StageSeconds
from darkroom_server.core.job import DEADLINE_SLACK_SECONDS
from darkroom_server.dispatch.admission.controller import AdmissionController
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs import outcomes
from darkroom_server.dispatch.jobs.deadlines import Deadlines
from darkroom_server.dispatch.jobs.job import ActiveJob, Finished, JobState
from darkroom_server.dispatch.jobs.outcomes import Counts, JobOutcome
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.observer import Observer


class JobLifecycle:
    """Moves jobs from place to place, and ends each of them once.

    ``idle`` is set while nobody waits for any job.
    """

    def __init__(
        self, roster: JobRegistry, fleet: EnginePool, gate: AdmissionController, observer: Observer
    ) -> None:
        self.counts = Counts()
        self.idle = asyncio.Event()
        self.idle.set()
        self._roster = roster
        self._fleet = fleet
        self._gate = gate
        self._observer = observer
        self._deadlines = Deadlines(self._expire)

    def close(self) -> None:
        """Watch no deadline any more."""
        self._deadlines.close()

    # In.

    def enter(self, accepted: ActiveJob) -> None:
        """Queue a job that was let in."""
        self.counts.accepted += 1
        self.idle.clear()
        self._roster.move(accepted, JobState.QUEUE)
        self._deadlines.add(accepted.job.id, accepted.job.deadline)
        self.feed()

    def feed(self) -> None:
        """Hand waiting jobs to the engines while they have room, the most urgent first."""
        for accepted in self._roster.in_order():
            slot = self._fleet.choose(accepted)
            if slot is None:
                # Nobody overtakes: what waits for an empty engine would wait for ever.
                break
            self._roster.move(accepted, JobState.ENGINE)
            self._fleet.hand_over(accepted, slot)
        self._roster.tell_positions()

    def extend(self, accepted: ActiveJob, deadline: float | None) -> None:
        """Let a job live until ``deadline``, where that is later than its own; None is never."""
        job = accepted.job
        if accepted.ended or job.deadline is None:
            return
        if deadline is None or deadline > job.deadline:
            accepted.job = replace(job, deadline=deadline)
            self._deadlines.discard(job.id)
            self._deadlines.add(job.id, deadline)
            self._fleet.extend(job.id, deadline)

    def came_back(self, accepted: ActiveJob) -> None:
        """Queue a job again that its engine has let go unfinished; what is drawn of it stays."""
        if len(accepted.images) == accepted.job.image_count:
            self.left_engine(accepted, outcomes.finished(accepted, StageSeconds()))
            return
        self._fleet.left(accepted.job.id)
        accepted.starts_over()
        self._roster.move(accepted, JobState.QUEUE)
        self.feed()

    # Out.

    def cancel(self, job_id: str) -> None:
        """Give a job up, wherever it is and whoever waits; unknown and ended ones are ignored."""
        if (accepted := self._roster.get(job_id)) and not accepted.ended:
            self._withdraw(accepted)
            self._end(accepted, *outcomes.cancelled())

    def abandon(self, job_id: str) -> None:
        """Nobody waits for a job any more."""
        accepted = self._roster.get(job_id)
        if accepted is None or accepted.ended:
            return
        # gRPC ends a call whose deadline passed by cancelling it, and may be faster than we are.
        deadline = accepted.job.deadline
        if deadline is not None and deadline - DEADLINE_SLACK_SECONDS <= time.monotonic():
            self._expire(job_id)
        else:
            self.cancel(job_id)

    def left_engine(self, accepted: ActiveJob, outcome: outcomes.Outcome) -> None:
        """An engine has let a job go, which ends it."""
        self._fleet.left(accepted.job.id)
        self._leave(accepted, outcome)
        self.feed()

    def crashed(self, victims: list[ActiveJob], *, last: bool) -> None:
        """Queue the jobs again that were in an engine when it died, or end them.

        ``last``: no engine will come back.
        """
        for accepted in victims:
            accepted.engine_died(time.monotonic())
            if outcome := outcomes.after_crash(accepted, last=last):
                self._leave(accepted, outcome)
            else:
                self._roster.move(accepted, JobState.QUEUE)
                accepted.restarts()
                self._observer.replayed(accepted.job.model)
        self.feed()

    def withdraw_all(self, end: JobOutcome, error: DarkroomError) -> None:
        """End every job that has not ended, and let the engines know."""
        for accepted in self._live_jobs():
            self._withdraw(accepted)
            self._end(accepted, end, error)

    def no_engine_left(self) -> None:
        """End every job that has not ended: there are no engines any more."""
        for accepted in self._roster.waiting():
            self._leave(accepted, outcomes.stopped())
        for accepted in self._live_jobs():
            self._end(accepted, *outcomes.stopped())

    def _live_jobs(self) -> list[ActiveJob]:
        return [accepted for accepted in self._roster.all() if not accepted.ended]

    def _withdraw(self, accepted: ActiveJob) -> None:
        """Take a job out of the queue, or tell the engine to let it go."""
        if accepted.place is JobState.QUEUE:
            self._roster.move(accepted, JobState.OUTSIDE)
            self._roster.tell_positions()
        elif accepted.place is JobState.ENGINE:
            self._fleet.cancel(accepted.job.id)

    def _leave(self, accepted: ActiveJob, outcome: outcomes.Outcome) -> None:
        self._roster.move(accepted, JobState.OUTSIDE)
        self._end(accepted, *outcome)

    def _end(self, accepted: ActiveJob, end: JobOutcome, outcome: Finished | DarkroomError) -> None:
        """The one end of a job for its waiters; a second one is not told."""
        if accepted.ended:
            return
        if end is JobOutcome.EXPIRED:
            self._gate.estimates.expired(accepted)
        accepted.end(outcome)
        self._deadlines.discard(accepted.job.id)
        self._gate.ended(accepted)
        self.counts.by_end[end] += 1
        self._observer.ended(accepted.job.model, end, accepted.phase)
        if self.counts.live == 0:
            self.idle.set()

    def _expire(self, job_id: str) -> None:
        accepted = self._roster.get(job_id)
        if accepted is None:
            return
        outcome = outcomes.expired(begun=accepted.place is not JobState.QUEUE)
        self._withdraw(accepted)
        self._end(accepted, *outcome)
