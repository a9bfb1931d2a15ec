"""Which jobs are here, and where each of them is."""

from collections import Counter

from darkroom_server.core.order import order
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState
from darkroom_server.dispatch.observer import Observer


class JobRegistry:
    """Every job that waits or is in the engine, by id.

    Until the engine has let a job go, its id stays taken and its samples count, whether or not
    its caller still waits.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._jobs: dict[str, ActiveJob] = {}
        self._places: Counter[tuple[str, JobState]] = Counter()
        self._resident_samples = 0

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def get(self, job_id: str) -> ActiveJob | None:
        """The job of that id, None where it is not here."""
        return self._jobs.get(job_id)

    def all(self) -> list[ActiveJob]:
        """Every job that is here."""
        return list(self._jobs.values())

    def waiting(self) -> list[ActiveJob]:
        """The jobs that wait for a place in the engine, in the order of their arrival."""
        return [accepted for accepted in self._jobs.values() if accepted.place is JobState.QUEUE]

    def in_order(self) -> list[ActiveJob]:
        """The jobs that wait, the most urgent first."""
        waiting = {accepted.job.id: accepted for accepted in self.waiting()}
        return [waiting[key.id[0]] for key in order(a.key() for a in waiting.values())]

    def tell_positions(self) -> None:
        """Let the jobs that wait know how many go before each."""
        for position, accepted in enumerate(self.in_order()):
            accepted.waits(position)

    @property
    def queued(self) -> int:
        """How many jobs wait."""
        return sum(n for (_, place), n in self._places.items() if place is JobState.QUEUE)

    @property
    def running(self) -> int:
        """How many jobs are in the engine, those included that are about to leave it."""
        return sum(n for (_, place), n in self._places.items() if place is JobState.ENGINE)

    @property
    def resident_samples(self) -> int:
        """How many images are in the engine."""
        return self._resident_samples

    def count(self, model: str, place: JobState) -> int:
        """How many jobs of ``model`` are in this place."""
        return self._places[model, place]

    def move(self, accepted: ActiveJob, place: JobState) -> None:
        """Put a job where it is now."""
        job = accepted.job
        self._count(accepted, -1)
        accepted.place = place
        accepted.position = None
        self._count(accepted, +1)
        if place is JobState.OUTSIDE:
            del self._jobs[job.id]
        else:
            self._jobs[job.id] = accepted
        self._observer.jobs(
            job.model,
            queued=self._places[job.model, JobState.QUEUE],
            running=self._places[job.model, JobState.ENGINE],
        )

    def _count(self, accepted: ActiveJob, sign: int) -> None:
        self._places[accepted.job.model, accepted.place] += sign
        if accepted.place is JobState.ENGINE:
            self._resident_samples += sign * accepted.job.image_count
