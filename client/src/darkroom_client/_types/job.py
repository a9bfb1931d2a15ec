"""The state of a job, for callers that do not watch it."""

from dataclasses import dataclass
from enum import StrEnum


class JobState(StrEnum):
    """How far a job is, or how it ended.

    QUEUED: it waits. RUNNING: an engine has it. FINISHED: ``Client.result`` returns its images.
    FAILED: the server failed it. EXPIRED: its deadline passed. UNKNOWN: a state that is newer than
    this client.
    """

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job at one moment.

    ``step`` of ``steps`` denoiser calls are done, of all images together; some schedulers make more
    calls than the requested steps. ``queue_position``: the number of jobs before it, None if it
    does not wait. ``age``: seconds since the request arrived. ``estimated_finish``: seconds from
    now to the last image; None if the server does not know, and for a job that ended.
    ``error_reason`` and ``error_message``: why it has no result, "" if it is not known.
    """

    request_id: str
    state: JobState
    model: str
    image_count: int
    finished_images: int
    step: int
    steps: int
    queue_position: int | None
    age: float
    estimated_finish: float | None
    error_reason: str = ""
    error_message: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job has ended, with a result or without."""
        return self.state not in (JobState.QUEUED, JobState.RUNNING, JobState.UNKNOWN)
