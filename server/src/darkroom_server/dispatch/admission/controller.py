"""Admission control: accepts a job, or says why not."""

import time

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import DeadlineExceeded, TooLarge
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch.admission.availability import Availability
from darkroom_server.dispatch.admission.limits import QueueLimits
from darkroom_server.dispatch.admission.quotas import Quotas
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.estimation.estimate import Estimate
from darkroom_server.dispatch.estimation.estimator import Estimator
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.registry import JobRegistry

LOSSES_BEFORE_ISOLATION = 2
"""One server may die for reasons of its own, while it runs many jobs."""


class AdmissionController:
    """Checks new jobs against the server's state, memory, quotas, queue limits and deadlines.

    With ``early_refusal`` it rejects a job that is not expected to meet its deadline.
    """

    def __init__(
        self,
        availability: Availability,
        estimator: Estimator,
        pool: EnginePool,
        registry: JobRegistry,
        limits: QueueLimits,
        *,
        early_refusal: bool,
    ) -> None:
        self.limits = limits
        self._availability = availability
        self._estimator = estimator
        self._pool = pool
        self._registry = registry
        self._early_refusal = early_refusal
        self._quotas = Quotas()

    def admit(self, job: Job, caller: Caller) -> ActiveJob:
        """Accept ``job``, estimate it, and count it for its caller.

        Raises ``UnknownModel``, ``NotReady``, ``TooLarge``, ``DeadlineExceeded``,
        ``QuotaExceeded`` or ``QueueFull``.
        """
        model = self._availability.model(job.model)
        check_fits(job, model)
        now = time.monotonic()
        if job.deadline is not None and job.deadline <= now:
            raise DeadlineExceeded("the deadline passed before the request was accepted")
        self._quotas.check(caller, now)
        active = ActiveJob(job, model, caller)
        if not self._pool.has_room(active):
            waiting = [active.job for active in self._registry.queue()]
            self.limits.check(job, waiting, self._estimator.retry_after)
        if active.input_bytes:
            held = sum(each.input_bytes for each in self._registry.all() if not each.ended)
            self.limits.check_inputs(active.input_bytes, held, self._estimator.retry_after)
        active.estimate = self._estimator.estimate(active)
        if self._early_refusal and job.deadline is not None:
            self._estimator.check_deadline(job.deadline, active.estimate)
        self._quotas.accepted(caller)
        return active

    def readmit(self, job: Job, model: ModelInfo, caller: Caller, losses: int) -> ActiveJob:
        """Accept a job that an earlier server had accepted; only its size can be a reason not to.

        ``losses``: servers that died while they ran it. After the second it is isolated, as a job
        that an engine died with. Raises ``TooLarge``.
        """
        check_fits(job, model)
        active = ActiveJob(job, model, caller)
        active.crashes = int(losses >= LOSSES_BEFORE_ISOLATION)
        active.estimate = self._estimator.estimate(active)
        self._quotas.accepted(caller)
        return active

    def estimate(self, job: Job) -> Estimate | None:
        """How long ``job`` would take if it came now; None while too little is known.

        Raises ``UnknownModel``, ``NotReady`` or ``TooLarge``.
        """
        model = self._availability.model(job.model)
        check_fits(job, model)
        return self._estimator.estimate(ActiveJob(job, model))

    def release(self, active: ActiveJob) -> None:
        """An admitted job has ended."""
        self._quotas.ended(active.caller)


def check_fits(job: Job, model: ModelInfo) -> None:
    """Raise ``TooLarge`` if ``job`` does not fit in memory, even alone."""
    needed, available = model.needed_bytes(job), model.memory.available_bytes
    if needed > available:
        images, smaller = "an image", "a smaller one"
        if job.image_count > 1 and model.held_bytes(job):
            images, smaller = f"a job of {job.image_count} images", "fewer or smaller ones"
        raise TooLarge(
            f"{images} of {job.width}×{job.height} pixels needs {needed >> 20} MiB of memory, and "
            f"{model.runtime.device} has {available >> 20} MiB left; ask for {smaller}",
            metadata={"needed_bytes": str(needed), "available_bytes": str(available)},
        )
