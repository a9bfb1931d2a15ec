"""Owns every accepted job, from admission to its end."""

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import structlog

from darkroom_server.core.caller import ANYBODY, Caller
from darkroom_server.core.engine import Engine
from darkroom_server.core.errors import DarkroomError, StartupError
from darkroom_server.core.events import EngineReady, Event
from darkroom_server.core.job import DEADLINE_SLACK_SECONDS, Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch import outcomes
from darkroom_server.dispatch.accepted import AcceptedJob, Finished, Place
from darkroom_server.dispatch.admission import Admission, QueueLimits, check_fits, going_away
from darkroom_server.dispatch.counts import Counts, End
from darkroom_server.dispatch.deadlines import Deadlines
from darkroom_server.dispatch.estimate import Estimate
from darkroom_server.dispatch.fleet import Fleet
from darkroom_server.dispatch.gate import Gate
from darkroom_server.dispatch.observer import Observer, Unobserved
from darkroom_server.dispatch.reports import Reports
from darkroom_server.dispatch.roster import Roster
from darkroom_server.dispatch.snapshot import Snapshot, State, snapshot_of, state_of

log = structlog.get_logger(__name__)


class Dispatcher:
    """Admits jobs, keeps those that wait in order, and feeds the engines.

    All methods belong to one event loop. ``model_ids`` are the models the server was told to hold,
    in that order. ``max_queued_jobs`` and ``max_queued_megapixel_steps`` bound what waits. A job is
    handed over while fewer than ``max_resident_samples`` images are in an engine. With
    ``early_refusal`` jobs are refused that cannot be expected to meet their deadlines. More than
    ``max_restarts`` deaths of engines in ten minutes are the end. ``on_state`` is told of each
    change of ``state``, and now and then of none.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        model_ids: Iterable[str],
        *,
        max_queued_jobs: int,
        max_resident_samples: int,
        max_queued_megapixel_steps: float = math.inf,
        early_refusal: bool = True,
        max_restarts: int = 5,
        observer: Observer | None = None,
        on_state: Callable[[State], None] = lambda _: None,
    ) -> None:
        self.counts = Counts()
        self._admission = Admission(model_ids)
        self._on_state = on_state
        self._observer = observer or Unobserved()
        self._roster = Roster(self._observer)
        self._fleet = Fleet(
            engines,
            max_resident_samples=max_resident_samples,
            max_restarts=max_restarts,
            observer=self._observer,
            on_event=self._on_event,
            on_crash=self._on_crash,
            on_change=self._on_change,
            on_end=self._on_end,
        )
        self._serial = itertools.count(1)
        self._deadlines = Deadlines(self._expire)
        limits = QueueLimits(jobs=max_queued_jobs, megapixel_steps=max_queued_megapixel_steps)
        self._gate = Gate(self._fleet, self._roster, limits, early_refusal=early_refusal)
        self._reports = Reports(
            self._roster, self._observer, self._gate.estimates, self._leave_engine
        )
        self._loaded = asyncio.Event()
        self._died = asyncio.Event()
        self._death: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    # What is so.

    @property
    def models(self) -> dict[str, ModelInfo | None]:
        """Every model by id, None for those that are not loaded yet."""
        return dict(self._admission.models)

    @property
    def state(self) -> State:
        """Whether jobs are accepted, and drawn."""
        return state_of(self._admission, self._fleet)

    @property
    def ready(self) -> bool:
        """Whether jobs are accepted, and an engine is there to draw them."""
        return self.state is State.READY

    @property
    def max_jobs(self) -> int:
        """The most jobs that can be here at once: those that wait, and those in the engines."""
        return self._gate.limits.jobs + self._fleet.max_resident_samples * len(self._fleet.slots)

    @property
    def queued_jobs(self) -> int:
        """Jobs that wait for a place in the engine."""
        return self._roster.queued

    @property
    def running_jobs(self) -> int:
        """Jobs in the engine, those included that are about to leave it."""
        return self._roster.running

    def snapshot(self) -> Snapshot:
        """The whole, as it is now."""
        return snapshot_of(
            self._admission, self._roster, self._fleet, self.counts, self._gate.limits
        )

    # From start to end.

    def start(self) -> None:
        """Let the engines load; ``loaded`` waits for the first."""
        self._fleet.start()

    async def loaded(self) -> None:
        """Wait until the models are loaded; raises ``StartupError`` where they cannot be."""
        await self._loaded.wait()
        if self._death is not None:
            raise StartupError(self._death)

    async def died(self) -> str:
        """Wait until no engine will come back, and say why; for ever if that never happens."""
        await self._died.wait()
        return self._death or ""

    def refuse_new_jobs(self) -> None:
        """Refuse new jobs from now on, because the server is going away."""
        self._admission.drain()
        self._on_change()

    async def drain(self, grace: float) -> None:
        """Refuse new jobs, and let accepted ones finish for ``grace`` seconds at most.

        Those that have not finished by then fail with ``NotReady``.
        """
        self.refuse_new_jobs()
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            log.warning("drain ends jobs unfinished", jobs=self.counts.live, grace=grace)
        for accepted in self._live_jobs():
            self._withdraw(accepted)
            self._end(accepted, End.FAILED, going_away())

    async def close(self) -> None:
        """End what is left, and the engines; waits until they have stopped."""
        await self.drain(0.0)
        self._deadlines.close()
        await self._fleet.close()

    # What callers want.

    def model(self, model_id: str) -> ModelInfo:
        """The loaded model ``model_id``; raises ``UnknownModel`` or ``NotReady``."""
        return self._admission.model(model_id)

    def new_job_id(self, request_id: str) -> str:
        """An id for a job: the request's own, unless a job that is still here has it.

        That one may be another caller's, or on its way out of the engine.
        """
        return f"{request_id}~{next(self._serial)}" if request_id in self._roster else request_id

    def estimate(self, job: Job) -> Estimate | None:
        """What ``job`` would take if it came now; None while too little is known.

        Raises ``UnknownModel``, ``NotReady`` or ``TooLarge``.
        """
        model = self._admission.model(job.model)
        check_fits(job, model)
        return self._gate.estimates.of(AcceptedJob(job, model, lambda _: None))

    def submit(self, job: Job, caller: Caller = ANYBODY) -> AcceptedJob:
        """Accept ``job`` of ``caller``, whose id must be unused.

        Raises ``UnknownModel``, ``NotReady``, ``TooLarge``, ``DeadlineExceeded``, ``QuotaExceeded``
        or ``QueueFull``.
        """
        model = self._admission.model(job.model)
        check_fits(job, model)
        if job.id in self._roster:
            raise ValueError(f"a job of id {job.id!r} is still here")
        accepted = AcceptedJob(job, model, self._abandon)
        self._gate.let_in(accepted, caller)
        self.counts.accepted += 1
        self._idle.clear()
        self._roster.move(accepted, Place.QUEUE)
        self._deadlines.add(job.id, job.deadline)
        self._feed()
        return accepted

    def cancel(self, job_id: str) -> None:
        """Give a job up, wherever it is and whoever waits; unknown and ended ones are ignored."""
        if (accepted := self._roster.get(job_id)) and not accepted.ended:
            self._withdraw(accepted)
            self._end(accepted, *outcomes.cancelled())

    def join(self, accepted: AcceptedJob, deadline: float | None) -> None:
        """Another call wants the same job, until ``deadline``; the later one counts, None most."""
        job = accepted.job
        self._observer.retry_joined(job.model)
        if accepted.ended or job.deadline is None:
            return
        if deadline is None or deadline > job.deadline:
            accepted.job = replace(job, deadline=deadline)
            self._deadlines.discard(job.id)
            self._deadlines.add(job.id, deadline)
            self._fleet.extend(job.id, deadline)

    # The way of a job.

    def _abandon(self, job_id: str) -> None:
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

    def _live_jobs(self) -> list[AcceptedJob]:
        return [accepted for accepted in self._roster.all() if not accepted.ended]

    def _feed(self) -> None:
        """Hand waiting jobs to the engines while they have room, the most urgent first."""
        for accepted in self._roster.in_order():
            slot = self._fleet.choose(accepted)
            if slot is None:
                # Nobody overtakes: what waits for an empty engine would wait for ever.
                break
            self._roster.move(accepted, Place.ENGINE)
            self._fleet.hand_over(accepted, slot)
        self._roster.tell_positions()

    def _withdraw(self, accepted: AcceptedJob) -> None:
        """Take a job out of the queue, or tell the engine to let it go."""
        if accepted.place is Place.QUEUE:
            self._roster.move(accepted, Place.OUTSIDE)
            self._roster.tell_positions()
        elif accepted.place is Place.ENGINE:
            self._fleet.cancel(accepted.job.id)

    def _end(self, accepted: AcceptedJob, end: End, outcome: Finished | DarkroomError) -> None:
        """The one end of a job for its waiters; a second one is not told."""
        if accepted.ended:
            return
        accepted.end(outcome)
        self._deadlines.discard(accepted.job.id)
        self._gate.ended(accepted)
        self.counts.by_end[end] += 1
        self._observer.ended(accepted.job.model, end, accepted.phase)
        if self.counts.live == 0:
            self._idle.set()

    def _expire(self, job_id: str) -> None:
        accepted = self._roster.get(job_id)
        if accepted is None:
            return
        outcome = outcomes.expired(begun=accepted.place is not Place.QUEUE)
        self._withdraw(accepted)
        self._end(accepted, *outcome)

    # What the engine tells.

    def _on_event(self, event: Event) -> None:
        match event:
            case EngineReady(models):
                self._admission.loaded(models)
                self._observer.loaded(event)
                self._loaded.set()
                self._feed()
            case _:
                self._reports.hear(event)

    def _leave_engine(self, accepted: AcceptedJob, outcome: outcomes.Outcome) -> None:
        self._fleet.left(accepted.job.id)
        self._leave(accepted, outcome)
        self._feed()

    def _leave(self, accepted: AcceptedJob, outcome: outcomes.Outcome) -> None:
        self._roster.move(accepted, Place.OUTSIDE)
        self._end(accepted, *outcome)

    def _on_change(self) -> None:
        """An engine came or went, or the server goes away."""
        self._observer.ready(self.ready)
        self._on_state(self.state)

    def _on_crash(self, victims: list[AcceptedJob]) -> None:
        """Queue the jobs again that were in an engine when it died, or end them."""
        for accepted in victims:
            accepted.engine_died(time.monotonic())
            if outcome := outcomes.after_crash(accepted, last=self._death is not None):
                self._leave(accepted, outcome)
            else:
                self._roster.move(accepted, Place.QUEUE)
                accepted.restarts()
                self._observer.replayed(accepted.job.model)
        self._feed()

    def _on_end(self, message: str) -> None:
        self._death = message
        self._admission.died()
        self._loaded.set()
        self._died.set()
        for accepted in self._roster.waiting():
            self._leave(accepted, outcomes.stopped())
        for accepted in self._live_jobs():
            self._end(accepted, *outcomes.stopped())
