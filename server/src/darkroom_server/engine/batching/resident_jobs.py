"""Who is in the engine: the jobs, and those of their samples that still take steps."""

from collections.abc import Callable

from darkroom_server.core.events import Event
from darkroom_server.core.job import Job
from darkroom_server.engine.batching.resident_job import ResidentJob
from darkroom_server.engine.sample import Group, Sample


class ResidentJobs:
    """The resident jobs: newcomers first, then developing, then gone when their pixels are."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._residents: dict[str, ResidentJob] = {}
        self._newcomers: list[ResidentJob] = []
        self._developing: dict[tuple[str, int], Sample] = {}

    @property
    def idle(self) -> bool:
        """True where no pass could be run."""
        return not (self._newcomers or self._developing)

    @property
    def residents(self) -> list[ResidentJob]:
        """Every job that can still leave."""
        return list(self._residents.values())

    def add(self, job: Job) -> None:
        """Take a newcomer in."""
        resident = ResidentJob(job, self._emit)
        self._residents[job.id] = resident
        self._newcomers.append(resident)

    def get(self, job_id: str) -> ResidentJob | None:
        """The job of that id, None where it has left."""
        return self._residents.get(job_id)

    def take_newcomers(self) -> dict[str, list[ResidentJob]]:
        """The newcomers, by model; they are none any more."""
        by_model: dict[str, list[ResidentJob]] = {}
        for resident in self._newcomers:
            by_model.setdefault(resident.job.model, []).append(resident)
        self._newcomers = []
        return by_model

    def develop(self, resident: ResidentJob, samples: list[Sample]) -> None:
        """Let the samples of ``resident`` take part in passes."""
        resident.samples = samples
        self._developing.update({(s.job.id, s.index): s for s in samples})

    def developing(self) -> dict[Group, dict[tuple[str, int], Sample]]:
        """The samples that want steps, by group."""
        groups: dict[Group, dict[tuple[str, int], Sample]] = {}
        for key, sample in self._developing.items():
            groups.setdefault(sample.group, {})[key] = sample
        return groups

    def developed(self, sample: Sample) -> None:
        """``sample`` took its last step."""
        del self._developing[sample.job.id, sample.index]

    def remove(self, resident: ResidentJob) -> None:
        """The job of ``resident`` leaves, with all its samples."""
        del self._residents[resident.job.id]
        if resident in self._newcomers:
            self._newcomers.remove(resident)
        for sample in resident.samples:
            self._developing.pop((sample.job.id, sample.index), None)
