"""The work that remains of a job, as plain keys for the simulation."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from darkroom_server.core.job import Job
from darkroom_server.core.order import OrderKey
from darkroom_server.dispatch.estimation.batch_times import Group
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class RemainingWork:
    """A job as the simulation sees it.

    ``calls``: the denoiser calls that remain for each unfinished image; more than there are, as far
    as ControlNets make them longer. ``key``: that of an image
    without any step taken. ``begun``: the job has taken part in a batch. ``encoded``: its prompts
    are encoded. ``bytes_per_image``: what an unfinished image holds between its batches.
    ``adapted``: its rows have LoRA adapters.
    """

    id: str
    group: Group
    key: OrderKey
    calls: tuple[int, ...]
    begun: bool = False
    encoded: bool = False
    bytes_per_image: int = 0
    adapted: bool = False

    def goal(self, calls: int) -> float:
        """When an image with ``calls`` remaining calls should be done; see ``core.order``."""
        return self.key.goal_of(calls)


def remaining_work(active: ActiveJob) -> RemainingWork:
    """The work that remains of a job."""
    job = active.job
    all_calls = active.model.denoiser_calls(job)
    return RemainingWork(
        id=job.id,
        group=Group.of(job),
        key=OrderKey(
            id=(job.id, 0),
            submitted_at=job.submitted_at,
            remaining_steps=all_calls,
            priority=job.priority,
            deadline=job.deadline,
            rows=active.model.rows_per_image(job),
            alone=job.exact,
        ),
        calls=_remaining_calls(active, all_calls),
        begun=active.started,
        bytes_per_image=active.model.held_bytes(job),
        adapted=bool(job.active_loras),
        encoded=_is_encoded(active),
    )


def _progressed(work: RemainingWork, active: ActiveJob) -> RemainingWork:
    """``remaining_work`` of a job that ``work`` was of; cheaper, because steps are many."""
    return replace(
        work,
        calls=_remaining_calls(active, work.key.remaining_steps),
        begun=active.started,
        encoded=_is_encoded(active),
    )


def _remaining_calls(active: ActiveJob, all_calls: int) -> tuple[int, ...]:
    job = active.job
    calls = [
        active.remaining.get(index, all_calls)
        for index in job.image_indices
        if index not in active.images
    ]
    if job.controls:
        longer = 1.0 + active.model.control_cost(job)
        calls = [round(each * longer) for each in calls]
    return tuple(each for each in calls if each > 0)


def _is_encoded(active: ActiveJob) -> bool:
    return active.started or active.state is JobState.ENCODED


class RemainingWorkCache:
    """The remaining work of jobs, computed again only after a change."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[object, ...], RemainingWork]] = {}

    def get(self, jobs: Iterable[ActiveJob]) -> list[RemainingWork]:
        """``remaining_work`` of each of ``jobs``; other jobs are removed from the cache."""
        before, self._known = self._known, {}
        for active in jobs:
            id = active.job.id
            state = (
                active.job,
                active.state,
                len(active.images),
                tuple(active.remaining.items()),
            )
            known = before.get(id)
            if known is None or known[0][0] is not active.job:
                known = state, remaining_work(active)
            elif known[0] != state:
                known = state, _progressed(known[1], active)
            self._known[id] = known
        return [work for _, work in self._known.values()]


def megapixel_steps(job: Job) -> float:
    """The size of a job: one step of a million pixels is 1."""
    return job.width * job.height * job.steps * job.image_count / 1e6
