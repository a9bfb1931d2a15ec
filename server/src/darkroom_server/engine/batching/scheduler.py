"""The batch scheduler: which jobs are in the engine, and which samples the next batch serves."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import Event, JobCancelled, JobFailed
from darkroom_server.core.job import Job
from darkroom_server.core.order import Turns, pick
from darkroom_server.engine.batch import Batch, Group
from darkroom_server.engine.batching.residency import Residency
from darkroom_server.engine.batching.resident_job import ResidentJob
from darkroom_server.engine.batching.row_limits import RowLimits

if TYPE_CHECKING:
    from darkroom_server.engine.device.timer import Timer
    from darkroom_server.engine.sample import Sample


class BatchScheduler:
    """Owns the resident jobs and their samples; knows no torch.

    A job is a newcomer until its prompts are encoded. Then its samples wait for batches until each
    took its last step. The job is removed when its last image is decoded, or when it ends early.
    ``encode_slowly`` are the ids of models whose prompts take long to encode. ``residency`` bounds
    what unfinished samples hold. A batch has at most ``max_adapters`` different adapters.
    Used from the loop's thread only.
    """

    def __init__(
        self,
        row_limits: Mapping[str, RowLimits],
        residency: Residency,
        emit: Callable[[Event], None],
        encode_slowly: Container[str] = (),
        max_adapters: int | None = None,
    ) -> None:
        self._max_adapters = max_adapters
        self._encode_slowly = encode_slowly
        self._row_limits = row_limits
        self._residency = residency
        self._emit = emit
        self._jobs: dict[str, ResidentJob] = {}
        self._newcomers: dict[str, ResidentJob] = {}
        self._owed: set[Group] = set()
        self._samples: dict[Group, dict[tuple[str, int], Sample]] = {}
        self._groups: dict[tuple[str, int], Group] = {}
        self._turns: Turns[Group] = Turns()

    @property
    def idle(self) -> bool:
        """True if there is nothing to encode and nothing to put into a batch."""
        return not (self._newcomers or self._samples)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def job_of(self, sample: "Sample") -> ResidentJob:
        """The resident job of ``sample``. Raises ``KeyError`` if it was removed."""
        return self._jobs[sample.job.id]

    @property
    def models_in_use(self) -> set[str]:
        """The models of all resident jobs."""
        return {resident.job.model for resident in self._jobs.values()}

    @property
    def adapters_in_use(self) -> set[tuple[str, str]]:
        """The adapters of all resident jobs, each with its model's id first."""
        jobs = [resident.job for resident in self._jobs.values()]
        return {(job.model, lora.id) for job in jobs for lora in job.loras}

    def add(self, job: Job, *, ready: bool = True) -> None:
        """Take a new job; it is a newcomer once it is ``ready``: its adapters are in memory."""
        self._jobs[job.id] = ResidentJob(job, self._emit)
        if ready:
            self.set_ready(job.id)

    def set_ready(self, job_id: str) -> None:
        """Let the next ``take_newcomers`` return a job; an unknown id is ignored."""
        if resident := self._jobs.get(job_id):
            self._newcomers[job_id] = resident

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Replace a job's deadline; an unknown id is ignored."""
        if resident := self._jobs.get(job_id):
            resident.extend(deadline)

    def cancel(self, job_id: str) -> None:
        """Remove a job and emit ``JobCancelled``; an unknown id is ignored."""
        if resident := self._jobs.get(job_id):
            self._cancel(resident, expired=False)

    def expire(self, now: float) -> None:
        """Cancel the jobs whose deadline has passed, and remove those that ended elsewhere."""
        for resident in list(self._jobs.values()):
            if resident.ended:  # An image of it could not be encoded.
                self._remove(resident)
            elif resident.job.deadline is not None and resident.job.deadline <= now:
                self._cancel(resident, expired=True)

    def fail(self, job_id: str, failure: Failure) -> None:
        """Remove a job and emit ``JobFailed``."""
        resident = self._jobs[job_id]
        self._remove(resident)
        resident.end(JobFailed(job_id, failure))

    def take_newcomers(self) -> dict[str, list[ResidentJob]]:
        """The newcomers to encode now, by model id, in the order of arrival; each once.

        The first job whose samples do not fit the memory waits, and those behind it too.

        Of the models that encode slowly one job is returned, and the next one after each group that
        waits now has had a batch: an encode must not hold up the jobs that run for long.
        """
        by_model: dict[str, list[ResidentJob]] = {}
        slow_is_due = not (self._owed & self._samples.keys())
        for id, resident in list(self._newcomers.items()):
            model = resident.job.model
            if not self._residency.has_room(resident.job):
                break
            if model in self._encode_slowly:
                if not slow_is_due:
                    continue
                slow_is_due = False
                self._owed = set(self._samples)
            del self._newcomers[id]
            self._residency.enter(resident.job)
            by_model.setdefault(model, []).append(resident)
        return by_model

    def start(self, job_id: str, samples: "Sequence[Sample]", prompt_timer: "Timer") -> None:
        """Let ``samples`` of a job take part in batches; ``prompt_timer`` timed its prompts."""
        self._jobs[job_id].prompt_encoded(samples, prompt_timer)
        for sample in samples:
            self._insert(sample)

    def next_batch(self) -> Batch | None:
        """The samples to run next, None if none waits.

        ``core.order.Turns`` chooses the group, and ``core.order.pick`` among its samples.
        """
        if not self._samples:
            return None
        group = self._turns.next(self._samples)
        samples = self._samples[group]
        waiting = sum(sample.rows for sample in samples.values())
        max_rows = self._row_limits[group.model].next_rows(
            group, waiting, self._residency.held_bytes
        )
        keys = pick([sample.key() for sample in samples.values()], max_rows, self._max_adapters)
        return Batch.of([samples[key.id] for key in keys])

    def max_rows(self, group: Group) -> int:
        """Rows that a batch of ``group`` may have now."""
        return self._row_limits[group.model].of(group, self._residency.held_bytes)

    def begin(self, batch: Batch, now: float) -> None:
        """Emit ``JobStarted`` for each job whose first batch this is; ``now`` is monotonic."""
        for sample in batch.samples:
            self.job_of(sample).begin_batch(now)

    def regroup(self, sample: "Sample") -> None:
        """Follow ``sample``, which took a step: its next call may be of another group."""
        if sample.group != self._groups[sample.job.id, sample.index]:
            self._forget(sample)
            self._insert(sample)

    def charge(self, batch: Batch, seconds: float) -> None:
        """Count ``batch``, which took ``seconds``, as a turn of its group."""
        self._owed.discard(batch.group)
        self._turns.charge(batch.group, seconds, max(sample.steps for sample in batch.samples))

    def denoised(self, sample: "Sample", now: float) -> None:
        """Take ``sample`` out of the batches: it took its last step, at ``now``."""
        self.job_of(sample).denoised(now)
        self._residency.finish_image(sample.job.id)
        self._forget(sample)

    def decoded(self, sample: "Sample", now: float) -> ResidentJob:
        """The job of ``sample``, which was decoded at ``now``; removed if it was its last image.

        The encode pool finishes the rest of the job.
        """
        resident = self.job_of(sample)
        if resident.decoded(now):
            self._remove(resident)
        return resident

    def _cancel(self, resident: ResidentJob, *, expired: bool) -> None:
        self._remove(resident)
        resident.end(JobCancelled(resident.job.id, expired, resident.engine_seconds))

    def _remove(self, resident: ResidentJob) -> None:
        del self._jobs[resident.job.id]
        self._newcomers.pop(resident.job.id, None)
        self._residency.leave(resident.job.id)
        for sample in resident.samples:
            self._forget(sample)
            sample.close()

    def _insert(self, sample: "Sample") -> None:
        id, group = (sample.job.id, sample.index), sample.group
        self._groups[id] = group
        self._samples.setdefault(group, {})[id] = sample

    def _forget(self, sample: "Sample") -> None:
        id = (sample.job.id, sample.index)
        group = self._groups.pop(id, None)
        if group is None:
            return
        waiting = self._samples[group]
        del waiting[id]
        if not waiting:
            del self._samples[group]
