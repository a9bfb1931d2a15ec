"""What is left to do of a job, as plain keys for the forecast."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from darkroom_server.core.job import Job
from darkroom_server.core.order import OrderKey
from darkroom_server.dispatch.estimation.batch_times import Group
from darkroom_server.dispatch.jobs.job import ActiveJob


@dataclass(frozen=True, slots=True, kw_only=True)
class RemainingWork:
    """A job as the forecast sees it: ``passes`` are those left for each of its images.

    ``key`` is that of an image no pass of which is taken. ``begun``: its first pass is behind it.
    """

    id: str
    group: Group
    key: OrderKey
    passes: tuple[int, ...]
    begun: bool = False

    def goal(self, passes: int) -> float:
        """By when an image with so many passes left should be done; see ``core.order``."""
        return replace(self.key, remaining_steps=passes).goal


def remaining_work(accepted: ActiveJob, left: Mapping[int, int] | None = None) -> RemainingWork:
    """What is left of a job; ``left`` are the passes of those images that took one, by index."""
    job = accepted.job
    calls = accepted.model.denoiser_calls(job)
    passes = [
        (left or {}).get(index, calls)
        for index in job.image_indices
        if index not in accepted.images
    ]
    return RemainingWork(
        id=job.id,
        group=Group.of(job),
        key=OrderKey(
            id=(job.id, 0),
            submitted_at=job.submitted_at,
            remaining_steps=calls,
            priority=job.priority,
            deadline=job.deadline,
            rows=job.rows_per_image,
            alone=job.exact,
        ),
        passes=tuple(each for each in passes if each > 0),
        begun=accepted.started,
    )


class RemainingWorkCache:
    """What is left of jobs, worked out anew only where something happened to one."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[object, ...], RemainingWork]] = {}

    def of(
        self, jobs: Iterable[ActiveJob], left: Mapping[str, Mapping[int, int]]
    ) -> list[RemainingWork]:
        """``remaining_work`` of each of ``jobs``; other jobs are removed from the cache."""
        before, self._known = self._known, {}
        for accepted in jobs:
            id = accepted.job.id
            mine = left.get(id, {})
            state = accepted.job, accepted.started, len(accepted.images), tuple(mine.values())
            known = before.get(id)
            if known is None or known[0] != state:
                known = state, remaining_work(accepted, mine)
            self._known[id] = known
        return [work for _, work in self._known.values()]


def megapixel_steps(job: Job) -> float:
    """The size of a job: a million pixels, one step, is one."""
    return job.width * job.height * job.steps * job.image_count / 1e6
