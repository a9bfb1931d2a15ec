"""When a job would start and finish, and whether it can meet its deadline."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from darkroom_server.core.errors import DeadlineUnreachable
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.estimation.batch_times import Group
from darkroom_server.dispatch.estimation.calibration import Calibration
from darkroom_server.dispatch.estimation.estimate import Estimate
from darkroom_server.dispatch.estimation.remaining_work import (
    RemainingWork,
    RemainingWorkCache,
    megapixel_steps,
    remaining_work,
)
from darkroom_server.dispatch.estimation.simulation import Forecast, simulate_queue
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState
from darkroom_server.dispatch.jobs.registry import JobRegistry

MARGIN_WITH_OTHERS = 1.5
"""With other jobs present, a job needs this multiple of its optimistic total until its deadline.

Later jobs may be more urgent and widen the batches. Accepting a job that misses its deadline wastes
engine time: in simulated fivefold overload, 94 % of the accepted jobs finish with 1.5, 61 % with 1.
"""

MARGIN_ALONE = 0.8
"""On an idle server, a job needs this multiple of its optimistic total until its deadline.

A wrong decision harms no other job.

Each rejection halves the margin until a batch is seen again: a measurement taken on a busy machine
must not reject jobs forever.
"""

UNKNOWN_RETRY_SECONDS = 1.0
SHORTEST_RETRY_SECONDS = 0.25
LONGEST_RETRY_SECONDS = 60.0


class LoadForecast(Protocol):
    """Knows when models will be loaded."""

    def seconds_until_loaded(self, new: ActiveJob | None) -> Mapping[str, float]:
        """When each model is probably loaded that no engine holds and that jobs wait for.

        As if ``new`` waited too.
        """


class Estimator:
    """Estimates from the engines' batch times, their jobs, the queue, and the ``loads`` of models.

    Without ``loads``, jobs are taken to wait for no load.
    """

    def __init__(
        self, pool: EnginePool, registry: JobRegistry, loads: LoadForecast | None = None
    ) -> None:
        self._pool = pool
        self._loads = loads
        self._registry = registry
        self._calibration = Calibration()
        self._cache = RemainingWorkCache()
        self._batches_seen = 0
        self._rejections_alone = 0

    def estimate(self, active: ActiveJob) -> Estimate | None:
        """For a job that is here or would come now; None while too little is known."""
        now = time.monotonic()
        engine = self._entered_at_once(active)
        if engine is None:
            simulated = self._simulate(active)
        else:
            jobs = (*engine.jobs.values(), active)
            most, work = self._pool.max_resident_samples, remaining_work(active)
            simulated = simulate_queue([engine.load()], [work], most), jobs
        id = active.job.id
        if simulated is None or id not in simulated[0].finishes:
            return None
        forecast, jobs = simulated
        finish = forecast.finishes[id]
        start = min(forecast.starts.get(id, 0.0), finish)
        factor = self._calibration.factor(finish)
        group = Group.of(active.job)
        optimism = min(each.batch_times.optimism(group) for each in self._pool.engines)
        return Estimate(
            made_at=now,
            queue_wait=start * factor,
            run_time=(finish - start) * factor,
            simulated=finish,
            optimistic=finish * self._calibration.optimistic_factor(finish) * optimism,
            model_finish_at=_model_finish_at(forecast, jobs, now, factor),
            engine=None if engine is None else engine.index,
        )

    def model_finish_at(self) -> dict[str, float]:
        """When the jobs of each model that are here have finished; empty if too little is known.

        In ``time.monotonic`` seconds.
        """
        now = time.monotonic()
        simulated = self._simulate()
        if simulated is None:
            return {}
        forecast, jobs = simulated
        factor = self._calibration.factor(max(forecast.finishes.values(), default=0.0))
        return _model_finish_at(forecast, jobs, now, factor)

    def record_actual(self, estimate: Estimate, seconds: float) -> None:
        """Learn from a finished job that took ``seconds`` since its estimate."""
        self._calibration.learn(estimate.simulated, seconds)

    def record_expired(self, active: ActiveJob) -> None:
        """Learn from a job that was not finished by its deadline."""
        if (estimate := active.estimate) is not None:
            self._calibration.expired(estimate.simulated, time.monotonic() - estimate.made_at)

    def check_deadline(self, deadline: float, estimate: Estimate | None) -> None:
        """Raise ``DeadlineUnreachable`` if a new job cannot meet ``deadline``, even with luck."""
        if estimate is None:
            return
        alone = all(active.ended for active in self._registry.all())
        remaining = deadline - estimate.made_at
        margin = self._margin_alone() if alone else MARGIN_WITH_OTHERS
        if estimate.optimistic * margin <= remaining:
            return
        self._calibration.rejected(estimate.simulated)
        if alone:
            self._rejections_alone += 1
        # A job alone may be tried with less than its estimate, but the advice is the estimate.
        needed = _round_up(estimate.total * (1.0 if alone else MARGIN_WITH_OTHERS))
        why = "" if alone else ", since others may come between,"
        raise DeadlineUnreachable(
            f"the deadline is in {remaining:.2f} s, and this would take about "
            f"{estimate.total:.2f} s, {estimate.queue_wait:.2f} s of them waiting; give it at "
            f"least {needed:.2f} s{why} or ask for fewer steps, fewer images or smaller ones",
            {
                "estimate_seconds": f"{estimate.total:.3f}",
                "queue_wait_seconds": f"{estimate.queue_wait:.3f}",
                "run_seconds": f"{estimate.run_time:.3f}",
                "remaining_seconds": f"{remaining:.3f}",
                "needed_seconds": f"{needed:.3f}",
            },
        )

    def retry_after(self, jobs: int, work: float) -> float:
        """Seconds until ``jobs`` jobs and ``work`` megapixel-steps have left the queue."""
        simulated = self._simulate()
        if simulated is None:
            return UNKNOWN_RETRY_SECONDS
        forecast, _ = simulated
        waiting = {active.job.id: active.job for active in self._registry.queue()}
        # Without a queue, there is room when a job finishes.
        leaves = {id: forecast.joins[id] for id in waiting if id in forecast.joins}
        leaves = leaves or forecast.finishes
        seconds = UNKNOWN_RETRY_SECONDS
        for id in sorted(leaves, key=leaves.__getitem__):
            seconds = leaves[id]
            jobs -= 1
            work -= megapixel_steps(waiting[id]) if id in waiting else work
            if jobs <= 0 and work <= 0.0:
                break
        seconds *= self._calibration.factor(seconds)
        return min(max(seconds, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)

    def _margin_alone(self) -> float:
        batches = sum(engine.batches for engine in self._pool.engines)
        if batches != self._batches_seen:
            self._batches_seen, self._rejections_alone = batches, 0
        return MARGIN_ALONE / 2.0 ** min(self._rejections_alone, 64)

    def _entered_at_once(self, new: ActiveJob) -> EngineHandle | None:
        """The one of several engines that ``new`` enters without a wait; None if that is not known.

        Then the others need not be simulated: only jobs that wait connect them.
        """
        if len(self._pool.engines) < 2 or new.state is not JobState.NEW or self._registry.queued:
            return None
        engine = self._pool.choose(new)
        if engine is None:
            return None
        models = {active.job.model for active in (*engine.jobs.values(), new)}
        return engine if all(map(engine.batch_times.knows, models)) else None

    def _simulate(
        self, new: ActiveJob | None = None
    ) -> tuple[Forecast, tuple[ActiveJob, ...]] | None:
        """Simulate all jobs that are here, and ``new``; returns the jobs too.

        None if a model was never measured.
        """
        engines = [engine for engine in self._pool.engines if engine.ready]
        incoming = new if new is not None and new.state is JobState.NEW else None
        waiting = self._registry.queue(incoming)
        running = [active for engine in engines for active in engine.jobs.values()]
        jobs = (*running, *waiting)
        held = {model for engine in engines for model in engine.models}
        aside = [active for active in waiting if active.job.model not in held]
        if aside and self._loads is not None:
            waiting = [active for active in waiting if active.job.model in held]
        models = {active.job.model for active in (*running, *waiting)}
        if new is not None:
            models.add(new.job.model)
        known = all(engine.batch_times.knows(model) for engine in engines for model in models)
        if not engines or not known:
            return None
        forecast = simulate_queue(
            [engine.load() for engine in engines],
            self._cache.get(waiting),
            self._pool.max_resident_samples,
            arrivals=self._after_loads(aside, incoming),
        )
        return forecast, jobs

    def _after_loads(
        self, aside: Sequence[ActiveJob], new: ActiveJob | None
    ) -> list[RemainingWork]:
        """The jobs that wait for a load, as if they arrived after it; not of unmeasured models.

        ``new``: one that has not arrived yet.
        """
        if self._loads is None or not aside:
            return []
        engines = [engine for engine in self._pool.engines if engine.ready]
        loaded = self._loads.seconds_until_loaded(new)
        works = []
        for active in aside:
            model = active.job.model
            if all(engine.batch_times.knows(model) for engine in engines):
                work = remaining_work(active)
                key = replace(work.key, submitted_at=loaded.get(model, 0.0))
                works.append(replace(work, key=key))
        return works


def _model_finish_at(
    forecast: Forecast, jobs: Iterable[ActiveJob], now: float, factor: float
) -> dict[str, float]:
    """The last end of a job of each model; ``factor`` corrects what was simulated."""
    finish_at: dict[str, float] = {}
    for active in jobs:
        at = now + factor * forecast.finishes.get(active.job.id, 0.0)
        finish_at[active.job.model] = max(at, finish_at.get(active.job.model, 0.0))
    return finish_at


def _round_up(seconds: float) -> float:
    """To a hundredth, so that a caller that gives what the message asks for gives enough."""
    return math.ceil(seconds * 100.0) / 100.0
