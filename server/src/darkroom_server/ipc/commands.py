"""What an engine is told while it runs; a ``core.job.Job`` by itself is a job to take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop a job at the next step boundary."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Extend:
    """Give a job until another deadline, in ``time.monotonic`` seconds; None for ever."""

    job_id: str
    deadline: float | None


@dataclass(frozen=True, slots=True)
class Close:
    """End at the next step boundary."""
