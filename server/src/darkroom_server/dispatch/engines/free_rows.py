"""Which waiting jobs fit the free rows of the batches that run."""

from collections.abc import Iterable, Mapping

from darkroom_server.dispatch.estimation.batch_times import Group
from darkroom_server.dispatch.jobs.job import ActiveJob


class FreeRows:
    """The free rows of the batches of engines, by group; of each group the most in one engine.

    It is asked about every waiting job, so it looks at the engines once.
    """

    def __init__(self, engines: Iterable[Mapping[Group, int]]) -> None:
        self._rows: dict[Group, int] = {}
        for free in engines:
            for group, rows in free.items():
                self._rows[group] = max(rows, self._rows.get(group, 0))
        self._models = {group.model for group in self._rows}

    def take(self, active: ActiveJob) -> bool:
        """Whether the images of a job that waits fit the batches of their group in one engine."""
        job = active.job
        if job.exact or job.model not in self._models:
            return False
        needed = (job.image_count - len(active.images)) * active.model.rows_per_image(job)
        return needed <= self._rows.get(Group.of(job), 0)
